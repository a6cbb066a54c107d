"""One command as several processes: torchrun, srun's variables, flowmap's own; nothing is trained or encoded before."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import FLOW, bytes_of
from PIL import Image

from flowmap.base.launch import Launch, first_node, launch_of
from flowmap.base.schema import RecipeError
from flowmap.plan.plan import resolve
from flowmap.recipe import read_recipe
from flowmap.train.processes import check_processes

AUTOENCODER = """
name: ae
data: {kind: folder, root: FOLDER/pictures, size: 8}
student: {kind: autoencoder_kl, channels: [8, 8], latent_channels: 2, groups: 4}
objective: {kind: reconstruction}
trainer: {steps: 2, accelerator: cpu}
log: {wandb: false}
"""
TEACHER = """
name: teacher
data: {kind: encoded, images: {kind: folder, root: FOLDER/pictures, size: 8}, autoencoder: {recipe: FOLDER/ae.yaml},
  batch_size: 1, held_out: 2, shard_items: 1}
student: {kind: dit, preset: nano, depth: 1, patch: 2}
objective: {kind: flow_matching}
trainer: {steps: 2, accelerator: cpu, devices: 4}
log: {wandb: false, grid_images: 4}
"""
STUDENT = """
name: taught
base: teacher
teacher: {recipe: FOLDER/teacher.yaml}
objective: {kind: ayf_emd, warmup_steps: 1}
evaluation: {teacher_steps: 2}
"""

FAILS = """
import os
from flowmap.train import make

def fail(*a, **k):
    raise RuntimeError("no space in memory")

if os.environ["SLURM_PROCID"] == "2":
    make.encode = fail
"""


def environment(**more: str) -> dict[str, str]:
    """That of a process which no launcher has started."""
    started = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_WORLD_SIZE")
    kept = {key: value for key, value in os.environ.items() if key not in started}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def torchrun(processes: int, *arguments, **more: str) -> subprocess.Popen:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return start([*run, "-m", "flowmap", *map(str, arguments)], **more)


def flowmap(*arguments, **more: str) -> subprocess.Popen:
    return start([sys.executable, "-m", "flowmap", *map(str, arguments)], **more)


def start(command: list[str], **more: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(**more), start_new_session=True, **pipes)


def ended(process: subprocess.Popen, seconds: float = 170) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the others that it started hold its pipes
        raise AssertionError(process.communicate()) from None
    return process.returncode, out, err


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """An autoencoder for one process, a teacher on its latents and a student for four; nothing is made."""
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    (tmp_path / "pictures").mkdir()
    for i in range(8):
        Image.new("RGB", (8, 8), (25 * i, 0, 255 - 25 * i)).save(tmp_path / "pictures" / f"{i}.png")
    for name, text in (("ae", AUTOENCODER), ("teacher", TEACHER), ("taught", STUDENT)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("FOLDER", str(tmp_path)))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("by", [torchrun, lambda _, *rest: flowmap(*rest)], ids=["torchrun", "flowmap"])
def test_four_processes_make_everything_that_a_student_needs(recipes, by):
    code, out, err = ended(by(4, "fit", "--recipe", recipes / "taught.yaml", "--out", recipes / "run"))
    assert code == 0, err
    assert "[1/4] ae: on 1 of 4 processes; the others wait" in err
    assert [line[:5] for line in err.splitlines() if line.startswith("[")] == ["[1/4]"] * 2 + [
        f"[{i}/4]" for i in (2, 3, 4)
    ], err
    assert out.count("student:") == 1 and (recipes / "run/metrics.json").is_file()
    (encoded,) = recipes.glob("runs/**/index.json")
    assert len(list(encoded.parent.glob("shard-*.arrow"))) == 8 and not list(encoded.parent.glob(".process*"))
    code, out, err = ended(by(4, "fit", "--recipe", recipes / "taught.yaml", "--out", recipes / "run"))
    assert code == 0 and err.count("complete in") == 4, err


PAIRED = """
name: paired
data: {kind: toy, points: 200, batch_size: 8}
student: {kind: mlp, width: 16, depth: 1}
objective: {kind: rectified}
coupling: {kind: pairs, teacher: {recipe: FOLDER/flow.yaml}, num: 40, shard_items: 8}
trainer: {steps: 2, accelerator: cpu, devices: 2}
log: {wandb: false, grid_images: 4}
"""


@pytest.mark.slow
def test_two_processes_make_the_pairs_that_one_makes(recipes):
    (recipes / "flow.yaml").write_text(FLOW)
    (recipes / "paired.yaml").write_text(PAIRED.replace("FOLDER", str(recipes)))
    code, _, err = ended(flowmap("fit", "--recipe", recipes / "paired.yaml", "--out", recipes / "run"))
    assert code == 0 and "[2/3] paired: 40 pairs ->" in err, err
    (folder,) = (path.parent for path in recipes.glob("runs/**/index.json"))
    made = bytes_of(folder)
    made.pop("checked.json")  # written when the data is first read
    assert len(list(folder.glob("shard-*.arrow"))) == 5
    shutil.rmtree(folder)
    code, _, err = ended(flowmap("pairs", "--recipe", recipes / "paired.yaml"))
    assert code == 0 and bytes_of(folder) == made, err


@pytest.mark.slow
def test_srun_starts_four_processes_and_one_that_fails_is_named(recipes):
    broken = recipes / "broken.py"
    broken.write_text(FAILS)
    command = ["fit", "--recipe", recipes / "taught.yaml", "--out", recipes / "run", "--import", broken]
    slurm = dict(SLURM_STEP_ID="0", SLURM_JOB_ID=str(os.getpid()), SLURM_STEP_NUM_TASKS="4", SLURM_STEP_NUM_NODES="1")
    numbered = [{**slurm, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(4)]
    found = [ended(process) for process in [flowmap(*command, **number) for number in numbered]]
    assert [code for code, _, _ in found] == [1] * 4, found
    lines = [line for _, _, err in found for line in err.splitlines() if line.startswith("flowmap: ")]
    assert lines == ["flowmap: process 2: no space in memory"], found
    (encoded,) = recipes.glob("runs/**/plan.json")
    assert 0 < len(list(encoded.parent.glob("shard-*.arrow"))) < 8, "the others' shards are kept"


def test_launches_as_their_programs_describe_them():
    torch_ = {"TORCHELASTIC_RUN_ID": "x", "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    where = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert launch_of(torch_ | where) == Launch("torchrun", 9, 16, 1, 8, "a", 1) and launch_of(torch_).node == 1
    slurm = {"SLURM_STEP_ID": "3", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}
    slurm |= {"SLURM_LOCALID": "1", "SLURM_JOB_ID": "42", "SLURM_STEP_NODELIST": "gpu[003-004,7],login1"}
    assert launch_of(slurm) == Launch("srun", 5, 8, 1, 4, "gpu003", 15_045)
    assert launch_of(slurm | {"SLURM_JOB_NAME": "bash"}) == Launch(), "a shell that srun started"
    assert launch_of({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == Launch(), "a batch script without srun"
    assert launch_of({}) == Launch() and launch_of({"NODE_RANK": "1"}).rank == 1
    assert first_node("n7") == "n7" and first_node("rack1-[08,11]") == "rack1-08"


def test_a_launcher_of_another_number_of_processes_is_refused_in_one_line(tiny):
    eight, one = (resolve(read_recipe(tiny, [f"trainer.devices={n}"])) for n in (8, 1))
    node, two_nodes = Launch("torchrun", world=8, local_world=8), Launch("srun", world=8, local_world=4)
    check_processes(node, [one, eight])
    check_processes(two_nodes, [])  # all is complete
    check_processes(Launch("flowmap", world=8, local_world=8), [one])
    for launch, stages in ((node, [one]), (Launch("torchrun", world=4, local_world=4), [eight])):
        with pytest.raises(RecipeError, match=rf"tiny: trainer.devices: .* and torchrun started {launch.world}"):
            check_processes(launch, stages)
    with pytest.raises(RecipeError, match="is 6 processes, and srun started 8"):
        check_processes(two_nodes, [resolve(read_recipe(tiny, ["trainer.devices=6"])), eight])


@pytest.mark.slow
def test_two_torchruns_that_need_one_teacher_train_it_once(recipes):
    for name in ("teacher", "taught"):
        path = recipes / f"{name}.yaml"
        path.write_text(path.read_text().replace("devices: 4", "devices: 2"))
    runs = [
        torchrun(2, "fit", "--recipe", recipes / "taught.yaml", "--out", recipes / name, f"seed={i}")
        for i, name in enumerate(("one", "two"))
    ]
    found = [ended(run) for run in runs]
    assert [code for code, _, _ in found] == [0, 0], found
    said = "".join(err for _, _, err in found)
    assert said.count("waiting for it") >= 1 and said.count("made by another process") >= 1
    assert sorted(path.name.split("-")[0] for path in (recipes / "runs").iterdir()) == ["ae", "encoded", "teacher"]
