"""A teacher, a student and data of one's own, from Python and from a recipe with --import; and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

import flowmap
from flowmap.base import trust
from flowmap.base.schema import RecipeError
from flowmap.export import export
from flowmap.nets import module_builders
from flowmap.samplers import Deterministic
from flowmap.student.config import StudentConfig
from flowmap.student.student import Student
from flowmap.train.doctor import examine

NETS = '''
import torch
from torch import nn
import flowmap

MEAN, STD = 0.3, 0.4

@flowmap.module("exact")
class Exact(nn.Module):
    """Exact for data of N(0.3, 0.4^2), the same in all coordinates; t = 0 noise, 1 data. Its embedding of time changes
    nothing.
    """

    def __init__(self, size=16):
        super().__init__()
        self.time, self.label = nn.Linear(1, 4), nn.Embedding(4, 1)
        self.gain = nn.Parameter(torch.ones(size))
        nn.init.zeros_(self.label.weight)
        self.leave = nn.Linear(4, size)
        nn.init.zeros_(self.leave.weight), nn.init.zeros_(self.leave.bias)

    def forward(self, x, t, label):
        a, b = t[:, None], 1 - t[:, None]
        level = x.mean(1, keepdim=True) - a * MEAN
        x0 = MEAN + a * STD**2 / (a**2 * STD**2 + b**2 / x.shape[1]) * level
        return self.gain * x0 + self.leave(torch.tanh(self.time(t[:, None]))) + self.label(label)

@flowmap.module("jump")
class Jump(nn.Module):
    """net(x, t, s): a mean velocity."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(18, 16)

    def forward(self, x, t, s):
        return self.layer(torch.cat([x, t[:, None], s[:, None]], 1))

class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x / 2

    @staticmethod
    def backward(ctx, grad):
        return grad / 2

class Stubborn(Jump):
    def forward(self, x, t, s):
        return Halved.apply(super().forward(x, t, s))

class Narrow(Jump):
    def forward(self, x, t, s):
        return super().forward(x, t, s)[:, :1]

class Several(Jump):
    def forward(self, x, t, s):
        return super().forward(x, t, s), s

class Branching(Jump):
    def forward(self, x, t, s):
        return super().forward(x, t, s) * (2 if t.mean() > 0.5 else 1)

class Cut(Jump):
    def forward(self, x, t, s):
        return super().forward(x, t, s).detach()
'''
SETTINGS = ["name=mine", "trainer.steps=2", "metrics=[]", "trainer.accelerator=cpu", "log.wandb=false"]
SETTINGS += ["student={kind: from_teacher}", "sampler.steps=[1, 2]", "evaluation.teacher_steps=4"]
RECIPE = """
name: mine
data: {{kind: pictures, root: {root}/points, num_classes: 3, batch_size: 16, held_out: 40}}
teacher:
  kind: module
  module: exact
  weights: {root}/exact.pth
  prediction: x0
  clock: {{kind: reversed}}
  shape: [16]
  classes: 3
  null_class: 3
  time_embedding: time
student: {{kind: from_teacher}}
objective: {{kind: ayf_mixed, warmup_steps: 2}}
sampler: {{kind: deterministic, steps: [1, 2]}}
evaluation: {{teacher_steps: 4}}
trainer: {{steps: 2, accelerator: cpu}}
log: {{wandb: false}}
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with my_nets.py, weights, points with three labels, and a recipe; nothing is allowed or given yet."""
    monkeypatch.setattr(trust, "_ALLOWED", {})
    for table in ("BUILDERS", "_GIVEN", "_WEIGHTS"):
        monkeypatch.setattr(module_builders, table, {})
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    (tmp_path / "my_nets.py").write_text(NETS)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(root=tmp_path))
    return tmp_path


@pytest.fixture
def nets(place):
    yield flowmap.allow_import(str(place / "my_nets.py"))
    sys.modules.pop("flowmap_import_my_nets", None)


def points(num: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (0.3 + 0.4 * torch.randn(num, 1, generator=generator)).expand(-1, 16), torch.arange(num) % 3


def wrapped(nets, **settings):
    stated = {"prediction": "x0", "clock": "reversed", "classes": 3, "null_class": 3, "time_embedding": "time"}
    return flowmap.wrap(nets.Exact(), **{**stated, **settings})


def fit(place, *overrides, **given):
    recipe = flowmap.read_recipe("toy/mixture", [*SETTINGS, *overrides])
    return flowmap.fit(recipe, place / "run", log=lambda line: None, **{"data": points(), **given})


def test_from_python_and_back(place, nets, monkeypatch):
    run = fit(place, teacher=wrapped(nets))
    samples = run.student.sample(4, steps=2, cond={"class": [0, 1, 2, -1]})
    assert run.student.config.num_classes == 3 and samples.shape == (4, 16)
    for table in ("BUILDERS", "_GIVEN", "_WEIGHTS"):  # as in another process
        monkeypatch.setattr(module_builders, table, {})
    monkeypatch.setattr(trust, "_ALLOWED", {})
    with pytest.raises(ValueError, match="no builder 'my_nets:Exact' .*imports='my_nets.py' of load_student"):
        flowmap.load_student(place / "run")
    again = flowmap.load_student(place / "run", imports=str(place / "my_nets.py"))
    assert torch.equal(again.sample(4, steps=2, cond={"class": [0, 1, 2, -1]}), samples)


@pytest.mark.slow  # torch.export takes seconds
def test_it_exports_without_its_class(place, nets):
    run = fit(place, teacher=wrapped(nets))
    program = torch.export.load(export(run.student, place / "torch", to="torch", steps=2) / "program.pt2").module()
    assert program(torch.randn(5, 16), {"class": torch.arange(5) % 3}).shape == (5, 16)


@pytest.mark.parametrize(("to", "custom"), [("diffusers", False), ("diffusers", True), ("lora", False)])
def test_an_export_that_wants_its_source_names_the_one_that_does_not(place, nets, to, custom):
    student = flowmap.wrap(nets.Jump())
    config = StudentConfig(student.settings, Deterministic(steps=(1, 2)), (16,))
    with pytest.raises(ValueError) as caught:
        export(Student(config, config.build()), place / "out", to=to, custom=custom)
    what = f"--to {to}: the student is the module 'my_nets:Jump', whose source flowmap does not have; take --to torch"
    assert str(caught.value) == f"{what} or --to onnx, programs that do not need it" and not (place / "out").exists()


def test_a_student_with_an_arrival_time_starts_from_its_own_weights(place, nets):
    jump = nets.Jump()
    before = jump.layer.weight.clone()
    run = fit(place, "optimizer.lr=1.0e-12", teacher=flowmap.wrap(velocity), student=jump, data=points()[0])
    torch.testing.assert_close(run.student.flow_map.net.model.layer.weight, before)
    assert run.student.config.net.digest is None and torch.equal(jump.layer.weight, before)


def velocity(x, t):
    """That of points at 0.3 + 0.4 N(0, 1): a function may be a teacher."""
    t = t[:, None]
    level = x.mean(1, keepdim=True) - (1 - t) * 0.3
    x0 = 0.3 + (1 - t) * 0.16 / ((1 - t) ** 2 * 0.16 + t**2 / 16) * level
    return (x - x0) / t.clamp(min=0.01)


def test_from_a_recipe_with_import(place, command, nets):
    torch.save(nets.Exact().state_dict(), place / "exact.pth")
    write_points(place)
    imported = ("--import", place / "my_nets.py")
    assert command("fit", "--recipe", place / "recipe.yaml", *imported, "--out", place / "out")[0] == 0
    assert command("sample", "--student", place / "out", "--num", 2, *imported, "--out", place / "drawn")[0] == 0
    assert not [*place.glob("out/student/*.pth")]


def test_a_student_and_pairs_from_a_recipe(place, nets):
    torch.save(nets.Exact().state_dict(), place / "exact.pth")
    write_points(place)
    teacher = yaml.safe_load((place / "recipe.yaml").read_text())["teacher"]
    own = ["student={kind: module, module: jump}", "data.conditional=false"]
    made = f"coupling={{kind: pairs, num: 20, teacher: {json.dumps(teacher)}}}"
    pairs = [made, "teacher=null", "objective={kind: rectified}", "student={kind: mlp, width: 8, depth: 1}"]
    for name, overrides in (("own", own), ("pairs", pairs)):
        recipe = flowmap.read_recipe(place / "recipe.yaml", overrides)
        run = flowmap.fit(recipe, place / name, log=lambda line: None)
        assert run.student.sample(3).shape == (3, 16)


def write_points(place):
    from safetensors.torch import save_file

    (place / "points").mkdir()
    save_file({"x0": points()[0].contiguous(), "class": points()[1]}, place / "points" / "a.safetensors")


@pytest.mark.parametrize(
    ("spoil", "overrides", "says"),
    [
        (lambda place: (place / "exact.pth").unlink(), [], "exact.pth: there is no such file"),
        (None, ["teacher.sha256=2fd387f3"], "exact.pth: is altered: its SHA-256 is"),
        (lambda place: (place / "exact.pth").write_bytes(b"PK" + bytes(40)), [], "is no whole file of weights alone"),
        (lambda place: torch.save({"step": 3}, place / "exact.pth"), [], "is no state dict of tensors: step"),
        (lambda place: torch.save({"gain": torch.ones(3)}, place / "exact.pth"), [], "weights: "),
        (None, ["teacher.classes=2", "teacher.null_class=2"], "has 3 classes"),
        (None, ["teacher.classes=30", "data.num_classes=30"], "may exceed its table"),
        (
            None,
            ["teacher.prediction=epsilon"],
            "is named wrongly: with 1/4, 1 and 4 times as much noise as signal its error is",
        ),
        (None, ["teacher.clock={kind: flow}"], "with clock: reversed of unit 1 it is"),
        (None, ["teacher.module=exakt"], "no builder 'exakt' (registered: exact, jump)"),
        (None, ["teacher.shape=[3]"], "teacher.module: its output has shape (2, 16), its input (2, 3)"),
        (None, ["teacher.kind=modul"], "no 'modul', did you mean 'module'?"),
        (None, ["teacher.time_embedding=null"], "submodules: time, label, leave"),
        (
            None,
            ["teacher.null_class=null", "data.drop_condition=0.1"],
            "null_class: data.drop_condition: above 0 asks the module",
        ),
    ],
)
def test_what_a_recipe_names_wrongly_is_one_line(place, command, nets, spoil, overrides, says):
    torch.save(nets.Exact().state_dict(), place / "exact.pth")
    write_points(place)
    if spoil is not None:
        spoil(place)
    code, _, err = command(
        "fit", "--recipe", place / "recipe.yaml", *overrides, "--import", place / "my_nets.py", "--out", place / "out"
    )
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("flowmap: ") and says in last, err
    assert "Traceback" not in err and not (place / "out").exists()


def test_modules_that_cannot_train_are_named_before_training(place, nets):
    teacher = flowmap.wrap(velocity)
    with pytest.raises(RecipeError, match="output has shape .2, 1., its input .2, 16."):
        fit(place, teacher=teacher, student=nets.Narrow(), data=points()[0])
    with pytest.raises(RecipeError, match="does not go through the student's module: .*Halved.*derivative=difference"):
        fit(place, teacher=teacher, student=nets.Stubborn(), data=points()[0])
    with pytest.raises(RecipeError, match="teacher: a Exact does not say what it predicts"):
        fit(place, teacher=nets.Exact())
    with pytest.raises(RecipeError, match="student: a Exact takes no arrival time s"):
        fit(place, teacher=wrapped(nets), student=nets.Exact())
    with pytest.raises(RecipeError, match="the data has 3 classes, .* 2 classes|data: has 3 classes"):
        fit(place, teacher=wrapped(nets, classes=2, null_class=2))
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda nets: nets.Several(), "student: module: its output is a tuple, not a tensor"),
        (lambda nets: nets.Branching(), "student: module: reads values of tensors in Python .*torch.where"),
        (lambda nets: nets.Cut(), "student: no weight takes part in its output, so that there is nothing to train"),
        (lambda nets: torch.jit.trace(nets.Jump(), (torch.ones(2, 16), torch.ones(2), torch.ones(2))), "ScriptModule"),
        (lambda nets: torch.compile(nets.Jump()), "module: is compiled; give it before torch.compile"),
    ],
    ids=["tuple", "branch", "detached", "traced", "compiled"],
)
def test_modules_that_no_derivative_goes_through_are_one_line(place, nets, made, says):
    with pytest.raises(RecipeError, match=says) as caught:
        fit(place, teacher=flowmap.wrap(velocity), student=made(nets), data=points()[0])
    assert "\n" not in str(caught.value) and not (place / "run").exists()


def test_a_teacher_that_cannot_be_called_is_named_and_not_the_student(place, nets):
    for teacher, says in (
        (lambda x, t: x[:, :5], r"teacher.module: its output has shape .2, 5., its input .2, 16."),
        (lambda x, t, label: x, r"teacher.module: cannot be called as net.x, t. with x .2, 16.: TypeError"),
    ):
        with pytest.raises(RecipeError, match=says):
            fit(place, teacher=flowmap.wrap(teacher, name="mine"), student=nets.Jump(), data=points()[0])
    with pytest.raises(RecipeError, match=r"teacher.module: cannot be called .* with x .2, 3, 4, 4.: RuntimeError"):
        fit(place, teacher=wrapped(nets), data=(torch.zeros(20, 3, 4, 4) - 0.5, torch.arange(20) % 3))


def test_doctor_proposes_a_derivative(place, nets):
    from flowmap.build.given import with_given

    recipe = flowmap.read_recipe("toy/mixture", SETTINGS)
    recipe = with_given(recipe, flowmap.wrap(velocity), nets.Stubborn(), points()[0])
    lines = examine(recipe, batch=2, device=torch.device("cpu"))
    assert lines[-1] == "choose objective.derivative=difference"
    assert any("derivative dual: not here" in line and "Halved" in line for line in lines)
