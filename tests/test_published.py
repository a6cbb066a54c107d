"""Networks of examples/published/ with the weights that others published: they are the models that they claim to be."""

from __future__ import annotations

import gzip
import hashlib
import runpy
import struct
from pathlib import Path

import pytest
import torch

import flowmap
from flowmap.data import DATA
from flowmap.plan.plan import resolve

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples/published"
PUBLISHED = ROOT.parent / "shared/published"


def published(file: str, name: str) -> tuple[torch.nn.Module, dict]:
    """The network of that file of examples/published with its weights, and the names of the file."""
    names = runpy.run_path(str(FOLDER / file))
    path = PUBLISHED / names["WEIGHTS"]
    if not path.is_file():
        pytest.skip(f"{names['WEIGHTS']} is not here: shared/published is only in some checkouts")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == names["SHA256"]
    net = names[name]().eval()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net, names


@pytest.fixture(scope="module")
def flow_vit():
    return published("mnist_flow_vit.py", "FlowViT")[0]


@pytest.fixture
def mnist():
    """The data kind of examples/published/mnist_test.py, registered for this test alone."""
    before = dict(DATA)
    module = flowmap.allow_import(str(FOLDER / "mnist_test.py"))
    yield module
    DATA.clear()
    DATA.update(before)


@torch.no_grad()
def euler(net, z, labels, steps):
    """Samples in [0, 1] of a network that predicts them; its time goes from noise at 0 to data at 1."""
    x = z
    for i in range(steps):
        x = x + (net(x, torch.full((len(z),), i / steps), labels) - x) / (steps - i)
    return x


@pytest.mark.parametrize(
    ("many", "errors"),
    [
        (50, {1: 0.193, 2: 0.1154, 4: 0.0788, 8: 0.0514}),
        pytest.param(200, {1: 0.199, 2: 0.128, 4: 0.097, 8: 0.073}, marks=pytest.mark.slow),
    ],
)
def test_few_steps_of_the_published_flow_miss_its_end_points_by_the_recorded_errors(flow_vit, many, errors):
    z, labels = torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 10
    ends = euler(flow_vit, z, labels, many)
    found = {n: float((euler(flow_vit, z, labels, n) - ends).square().mean().sqrt()) for n in errors}
    assert found == pytest.approx(errors, rel=0.04)  # those of 200 steps are of other noise


@torch.no_grad()
def test_the_published_ddpm_predicts_noise_with_the_recorded_errors(mnist):
    net, _ = published("mnist_ddpm.py", "DDPM")
    held_out = mnist.MNISTTest(root=str(PUBLISHED / "mnist-test")).build().held_out[:100]
    noise = torch.randn(held_out.shape, generator=torch.Generator().manual_seed(1))
    level = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
    found = {}
    for place in (100, 300, 500, 900):
        noisy = level[place].sqrt() * held_out + (1 - level[place]).sqrt() * noise
        found[place] = float((net(noisy, torch.full((100,), float(place))) - noise).square().mean())
    assert found == pytest.approx({100: 0.0668, 300: 0.0310, 500: 0.0136, 900: 0.00037}, rel=0.1)


def test_a_transposed_convolution_of_the_flow_is_its_product():
    net = runpy.run_path(str(FOLDER / "mnist_flow_vit.py"))["FlowViT"]()
    tokens = torch.randn(5, 16, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net.pixels(tokens), net.unpatch(tokens.mT.unflatten(2, (4, 4))))


def test_the_sine_table_of_the_ddpm_is_its_formula():
    net, _ = published("mnist_ddpm.py", "DDPM")
    table = net.position_embedding.embedding.weight
    torch.testing.assert_close(net.position_embedding(torch.arange(1000.0)), table, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["mnist_flow_vit", "mnist_ddpm"])
def test_the_recipes_are_read_and_say_what_the_network_files_say(name, mnist):
    names = runpy.run_path(str(FOLDER / f"{name}.py"))
    recipe = flowmap.read_recipe(FOLDER / f"{name}.yaml")
    assert recipe.teacher.sha256 == names["SHA256"] and recipe.teacher.weights.endswith(names["WEIGHTS"])
    assert resolve(recipe).recipe.data.outline()[0] == recipe.teacher.shape


def test_the_test_pictures_are_split_at_random_and_altered_files_are_refused(mnist, tmp_path, monkeypatch):
    """The files here are of MNIST's shapes, with the number of the picture in its first two bytes."""
    pictures = torch.zeros(10_000, 28, 28, dtype=torch.uint8)
    pictures[:, 0, 0], pictures[:, 0, 1] = torch.arange(10_000) // 100, torch.arange(10_000) % 100
    for name, array in zip(mnist.FILES, (pictures, torch.arange(10_000).remainder(10).byte()), strict=True):
        header = struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
        (tmp_path / name).write_bytes(gzip.compress(header + array.numpy().tobytes(), mtime=0))
    spec = mnist.MNISTTest(root=str(tmp_path))
    with pytest.raises(ValueError, match=r"data.root: .*images-idx3-ubyte.gz: is altered"):
        spec.build()
    md5 = {name: hashlib.md5((tmp_path / name).read_bytes()).hexdigest() for name in mnist.FILES}
    monkeypatch.setattr(mnist, "FILES", md5)
    data = spec.build()
    number = lambda x: ((x[:, 0, 0, 0] + 1) * 127.5).round() * 100 + ((x[:, 0, 0, 1] + 1) * 127.5).round()
    kept, out = number(data.train), number(data.held_out)
    assert sorted([*kept.tolist(), *out.tolist()]) == list(range(10_000))
    assert 2300 < int((out < 5000).sum()) < 2700 and torch.equal(out % 10, data.held_out_labels.float())
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match="labels-idx1-ubyte.gz: there is no such file"):
        spec.build()


def test_a_missing_or_altered_file_of_weights_is_one_line(tmp_path, mnist, monkeypatch):
    main = runpy.run_path(str(FOLDER / "run.py"))["main"]
    with pytest.raises(SystemExit, match=r"ddpm_mnist.pth: there is no such file; it is of github: Charles-yueyue831"):
        main(["mnist-ddpm", "--root", str(tmp_path)])
    (tmp_path / "mnist-ddpm").mkdir()
    (tmp_path / "mnist-ddpm/ddpm_mnist.pth").write_bytes(b"other")
    with pytest.raises(SystemExit, match=r"ddpm_mnist.pth: is altered, its SHA-256 is d9298a10"):
        main(["mnist-ddpm", "--root", str(tmp_path)])


@pytest.mark.slow
def test_one_command_distils_measures_draws_and_exports(flow_vit, tmp_path, mnist):
    main = runpy.run_path(str(FOLDER / "run.py"))["main"]
    settings = ["trainer.steps=2", "metrics=[]", "evaluation.teacher_steps=2", "log.grid_images=4"]
    main(["mnist-flow-vit", "--root", str(PUBLISHED), "--out", str(tmp_path / "run"), *settings])
    assert list((tmp_path / "run/samples").glob("*.png"))
    assert {path.name for path in (tmp_path / "run").glob("steps-*")} == {"steps-1", "steps-2", "steps-4"}


def test_the_tables_compare_a_student_with_its_own_teacher(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from tables.published import tables

    figures = lambda pixels, right: {"frechet_pixels": pixels, "frechet_classifier": 2 * pixels, "accuracy": right}
    teacher = {seed: {"euler 1": figures(9.0, 0.5), "euler 12": figures(2.0 + i, 0.9)} for i, seed in enumerate("01")}
    students = {seed: {"2": figures(3.0, 0.88), "train_steps": 7, "train_cpu_seconds": 5.0} for seed in "01"}
    made = tables({"mnist-flow-vit": {"real": {"0": figures(1.0, 0.98)}, "teacher": teacher, "ayf_mixed": students}})
    assert made["flowtargets"]["rows"] == [["ayf_mixed, 2", "2", *["1.25 (1 to 1.5)"] * 4, "2"]]
    assert [row[0] for row in made["flow"]["rows"]][-1] == "ayf_mixed, 2 steps" and "ddpm" not in made
    assert made["short"]["rows"][1] == ["teacher, euler 12", "2.5 (2 to 3)", "0.9"]


def test_ddim_is_even_in_the_places_of_the_table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from published import MODELS, SOLVERS, places

    level = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    sigma = ((1 - level) / level).sqrt()
    assert places(2) == [1.0, pytest.approx(float(sigma[499] / (1 + sigma[499])), rel=1e-4), 0.0]
    assert {stem for stem, _ in MODELS.values()} == set(SOLVERS)
    assert len(places(50)) == 51 and all(a > b for a, b in zip(places(50), places(50)[1:], strict=False))
