"""The row of a full-scale recipe in benchmarks/node.py, from its real classes at full size."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["imagenet512", "sd35-medium"])
def test_a_row_is_whole_and_its_weights_are_those_of_fully_shard(name):
    import node

    row = node.examined(name)
    assert node.starts(row) == "yes" and row["kernels"] > 1000 and row["need"] > 0
    assert set(row["memory"]) == {8, 32} and row["evaluation"]["device"] > 2**30
    assert len(node.row_of(row, {})) == len(node.COLUMNS)


def test_a_smaller_micro_batch_where_a_step_has_too_few_samples():
    import node

    assert node.on_nodes("dit256", 4) == ["trainer.num_nodes=4", "data.batch_size=8"]
    assert node.on_nodes("imagenet512", 4) == ["trainer.num_nodes=4", "data.batch_size=64"]
