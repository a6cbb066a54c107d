"""EDM and EDM2 pickles are read without execution: valid files are complete, and malicious ones are refused."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flowmap.convert.weights import import_weights
from flowmap.nets.edm import ADM, DDPMpp
from flowmap.nets.edm2 import EDM2
from flowmap.student.folder import load_student
from flowmap.teachers.pickled import read_pickle

SPEC = EDM2(channels=16, multipliers=(1, 2), num_blocks=1, attention_at=(4,))


def _reconstruct_persistent_obj(meta):
    raise AssertionError("a reader must not run this")


class Persistent:
    """Pickles as torch_utils.persistence does: its source and state, to be rebuilt by running the source."""

    def __init__(self, module, name, names=None):
        self.module, self.name, self.names = module, name, names or {}

    def __reduce__(self):
        state = {key: value for key, value in self.module.__dict__.items() if key not in ("_modules", "_version")}
        state["_modules"] = {key: packed(child, self.names) for key, child in self.module._modules.items()}
        meta = dict(type="class", version=6, module_src="import os; os._exit(9)", class_name=self.name, state=state)
        return _reconstruct_persistent_obj, (meta,)


def packed(module, names=None):
    """Containers pickle as torch modules; everything else is persistent, with its class name or that in `names`."""
    if module is None:
        return None
    if isinstance(module, torch.nn.ModuleDict):
        copy = torch.nn.ModuleDict()
        copy.__dict__["_modules"] = {key: packed(child, names) for key, child in module._modules.items()}
        return copy
    return Persistent(module, (names or {}).get(module, type(module).__name__), names)


@pytest.fixture
def theirs(monkeypatch):
    """Modules by the names that the published pickles use."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    monkeypatch.setattr(sys.modules[__name__]._reconstruct_persistent_obj, "__module__", "torch_utils.persistence")
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    util.EasyDict = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    for name, module in {"torch_utils": types.ModuleType("torch_utils"), "dnnlib": types.ModuleType("dnnlib")}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", persistence)
    monkeypatch.setitem(sys.modules, "dnnlib.util", util)
    return util.EasyDict


def written(path, easy_dict, seed=0):
    torch.manual_seed(seed)
    net = SPEC.build((3, 8, 8), num_classes=5, arrival=False)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    outer = torch.nn.Module()
    outer.unet, outer.sigma_data = net.unet, 0.5
    outer.logvar_linear = torch.nn.Linear(3, 1)
    path.write_bytes(
        pickle.dumps(
            easy_dict(ema=Persistent(outer.half(), "Precond"), dataset_kwargs=easy_dict(path="x"), encoder=None)
        )
    )
    return net


def test_a_pickle_becomes_a_folder_with_the_same_velocity(theirs, command, tmp_path):
    net = written(tmp_path / "net.pkl", theirs)
    code, out, err = command("import", "--from", tmp_path / "net.pkl", "--out", tmp_path / "weights")
    assert code == 0 and "(3, 8, 8), 5 classes" in out, err
    student = load_student(tmp_path / "weights")
    assert student.config.net == EDM2(channels=16, multipliers=(1, 2), num_blocks=1, attention_at=(4,))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9])
    cond = {"class": torch.tensor([1, -1])}
    with torch.no_grad():
        torch.testing.assert_close(
            student.flow_map.mean_velocity(x, t, t, cond), net.float()(x, t, t, cond), rtol=2e-2, atol=2e-2
        )  # half


def test_snapshots_are_combined_to_another_width(theirs, command, tmp_path):
    names = [tmp_path / f"net-{step:07d}-{std:.3f}.pkl" for step in (1000, 2000, 4000) for std in (0.05, 0.1)]
    for i, name in enumerate(names):
        written(name, theirs, seed=0 if i < 4 else 1)
    code, _, err = command("import", "--from", *names, "--std", 0.05, "--out", tmp_path / "weights")
    assert code == 0, err
    import_weights([str(names[4])], tmp_path / "alone")
    mixed, alone = (load_student(tmp_path / folder).flow_map.state_dict() for folder in ("weights", "alone"))
    for key, tensor in alone.items():  # the width of a snapshot at its own step is that snapshot
        torch.testing.assert_close(mixed[key], tensor, rtol=1e-4, atol=1e-4)
    code, _, err = command("import", "--from", *names[:2], "--out", tmp_path / "other")
    assert code == 2 and "--std" in err
    code, _, err = command(
        "import", "--from", names[0], tmp_path / "named-otherwise.pkl", "--std", 0.1, "--out", tmp_path / "other"
    )
    assert code == 2 and not (tmp_path / "other").exists()


EDM = {
    "SongUNet": DDPMpp(channels=32, multipliers=(1, 2), num_blocks=1, attention_at=(4,)),
    "SongUNet of NCSN++": DDPMpp(
        channels=32, multipliers=(2, 1), num_blocks=2, attention_at=(8,), ncsnpp=True, sigma_data=0.25
    ),
    "DhariwalUNet": ADM(channels=64, multipliers=(1, 2), num_blocks=1, attention_at=(4,)),
}


def written_by_edm(path, easy_dict, family, *, outer="EDMPrecond", inner=None, num_classes=5):
    """A pickle as EDM's training writes it: NumPy settings, a loss, and weights for augmentation labels."""
    torch.manual_seed(0)
    net = EDM[family].build((3, 8, 8), num_classes=num_classes, arrival=False)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    whole = torch.nn.Module()
    whole.model, whole.sigma_data, whole.sigma_max, whole.use_fp16 = (
        net.model,
        EDM[family].sigma_data,
        float("inf"),
        True,
    )
    whole._init_kwargs = easy_dict(model_type=family.split()[0], channel_mult=[1, 2])
    net.model.map_augment, net.model.skip_scale = (
        torch.nn.Linear(9, net.model.map_layer0.in_features, bias=False),
        np.sqrt(0.5),
    )
    names = {whole: outer, net.model: inner or family.split()[0]}
    data = easy_dict(ema=packed(whole, names), loss_fn=packed(torch.nn.Module(), {}), augment_pipe=None)
    path.write_bytes(pickle.dumps(data))
    del net.model.map_augment
    return net


@pytest.mark.parametrize("family", EDM)
@pytest.mark.parametrize("num_classes", [5, None])
def test_a_pickle_of_edm_becomes_a_folder_with_the_same_velocity(family, num_classes, theirs, command, tmp_path):
    net = written_by_edm(tmp_path / "net.pkl", theirs, family, num_classes=num_classes)
    code, out, err = command("import", "--from", tmp_path / "net.pkl", "--out", tmp_path / "weights")
    assert code == 0 and "(3, 8, 8)" in out, err
    student = load_student(tmp_path / "weights")
    assert (
        student.config.net == EDM[family] and student.config.num_classes == num_classes and not student.config.arrival
    )
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9])
    cond = {"class": torch.tensor([1, -1])} if num_classes else None
    with torch.no_grad():
        assert torch.equal(student.flow_map.mean_velocity(x, t, t, cond), net(x, t, t, cond))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"outer": "VPPrecond"}, "preconditioned by VPPrecond; of EDM's networks only EDMPrecond is read"),
        ({"outer": "iDDPMPrecond"}, "preconditioned by iDDPMPrecond"),
        ({"inner": "OtherUNet"}, "is of class OtherUNet; of EDM's networks SongUNet and DhariwalUNet are read"),
        ({"inner": "DhariwalUNet"}, "channels: 32 must be a multiple of 64"),
        (
            {"family": "DhariwalUNet", "inner": "SongUNet"},
            "net.model.enc.8x8_block0.affine.weight is (128, 256), in a network of these",
        ),
    ],
)
def test_another_network_is_one_line(changed, says, theirs, command, tmp_path):
    written_by_edm(tmp_path / "net.pkl", theirs, **{"family": "SongUNet", **changed})
    code, _, err = command("import", "--from", tmp_path / "net.pkl", "--out", tmp_path / "weights")
    assert code == 2 and len(err.splitlines()) == 1 and says in err, err
    assert not (tmp_path / "weights").exists()


RECIPE = """
data: {{kind: pictures, root: {root}/pictures, num_classes: 5, batch_size: 8}}
teacher:
  card: {root}/strong.yaml
  guidance: {{kind: autoguidance, weak: {root}/weak.yaml, scale: [1.0, 2.0], default: 1.5}}
student: {{kind: from_teacher}}
objective: {{kind: ayf_emd, warmup_steps: 2}}
trainer: {{steps: 3, accelerator: cpu, checkpoint_every_steps: 3}}
metrics: [{{kind: frechet, features: pixels, images: 200, reference_images: 200}}]
evaluation: {{teacher_steps: 2}}
log: {{every_steps: 1, wandb: false}}
"""


def test_from_pickles_to_a_student(theirs, command, tmp_path, monkeypatch):
    """Imported strong and weak models, autoguidance, a few steps of AYF-EMD, a student that samples."""
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("FLOWMAP_WEIGHTS", str(tmp_path / "weights"))
    for i, name in enumerate(("strong", "weak")):
        written(tmp_path / f"{name}.pkl", theirs, seed=i)
        (tmp_path / f"{name}.yaml").write_text("kind: converted\nsource: tests\nshape: [3, 8, 8]\nnum_classes: 5\n")
    (tmp_path / "pictures").mkdir()
    save_file(
        {"x0": torch.randn(400, 3, 8, 8).clamp(-1, 1), "class": torch.arange(400) % 5},
        tmp_path / "pictures" / "0.safetensors",
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(root=tmp_path))
    code, _, err = command("fit", "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert code == 2 and "flowmap import --from" in err.splitlines()[-1]
    for name in ("strong", "weak"):
        assert command("import", "--from", tmp_path / f"{name}.pkl", "--out", tmp_path / "weights" / name)[0] == 0
    code, out, err = command("fit", "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert code == 0 and "teacher 2" in out, err
    images = load_student(tmp_path / "run").sample(3, steps=2, cond={"class": 4}, guidance=1.2)
    assert images.shape == (3, 3, 8, 8) and images.isfinite().all()


class Bomb:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def storage_bytes(count):
    """A storage in torch's older format that declares `count` numbers and has four bytes."""
    buffer = io.BytesIO()
    torch.save(torch.zeros(1).storage(), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()[:-12] + struct.pack("<q", count) + bytes(4)


def module_with(modules) -> bytes:
    """A file with a torch module (a record) as network, with these _modules; None: the module itself, recursively."""
    net = torch.nn.Identity()
    net.__dict__["_modules"] = {"again": net} if modules is None else modules
    return pickle.dumps({"ema": net})


HOSTILE = {
    "modules that are none": (lambda: module_with([1, 2]), "no mapping from names"),
    "modules without a name": (lambda: module_with({3: None}), "no mapping from names"),
    "a module in itself": (lambda: module_with(None), "deep"),
    "system": (lambda: pickle.dumps(Bomb(os.system, "touch executed")), "system"),
    "eval": (lambda: pickle.dumps(Bomb(eval, "1")), "eval"),
    "nested": (
        lambda: pickle.dumps(Bomb(torch.storage._load_from_bytes, pickle.dumps(Bomb(os.system, "touch executed")))),
        "system",
    ),
    "attribute": (lambda: b"cos\nsystem\n(S'touch executed'\ntR.", "os.system"),
    "huge": (lambda: pickle.dumps(Bomb(torch.storage._load_from_bytes, storage_bytes(10 * 2**30))), "declares"),
    "wide": (
        lambda: pickle.dumps(
            Bomb(torch._utils._rebuild_tensor_v2, torch.zeros(1).untyped_storage(), 0, (10**10,), (0,), False, {})
        ),
        "",
    ),
    "memo": (lambda: b"\x80\x02Nr\xff\xff\xff\x7f.", "no network"),
    "outside": (lambda: b"\x80\x02Pelsewhere\n.", "outside of itself"),
    "torn": (lambda: pickle.dumps({"ema": [1, 2, 3]})[:-4], "not a whole pickle"),
    "no pickle": (lambda: b"PK\x03\x04 something", ""),
    "empty": (lambda: b"", "not a whole pickle"),
    "another": (lambda: pickle.dumps({"ema": {"weight": 1}}), "no network under 'ema'"),
    "deep": (lambda: b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".", ""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_line_and_nothing_runs(name, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, says = HOSTILE[name]
    (tmp_path / "file.pkl").write_bytes(make())
    code, _, err = command("import", "--from", tmp_path / "file.pkl", "--out", tmp_path / "weights")
    assert code == 2 and err.startswith("flowmap: ") and len(err.splitlines()) == 1 and says in err, err
    assert not (tmp_path / "executed").exists() and not (tmp_path / "weights").exists()


def test_plain_containers_and_tensors_come_back(tmp_path):
    held = {"a": [1, 2.5, "text", None], "b": torch.arange(6.0).reshape(2, 3).t(), "c": (True, {3, 4})}
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(held))
    back = read_pickle(tmp_path / "plain.pkl")
    assert torch.equal(back.pop("b"), held.pop("b")) and back == held


def pipeline_of_pickles(folder):
    """A tiny pipeline whose network and autoencoder are .bin files, as older repositories have them."""
    from safetensors.torch import load_file

    from tests.support.tiny_pipelines import save

    save("dit", folder)
    for part in ("transformer", "vae"):
        path = folder / part / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    return folder


def test_a_pipeline_of_pickles_becomes_one_of_safetensors(tmp_path, command, monkeypatch):
    from flowmap.nets.pretrained import load_pretrained
    from flowmap.plan.cards import find_card
    from flowmap.teachers.autoencoder import Autoencoder
    from tests.support.tiny_pipelines import save

    source, out = pipeline_of_pickles(tmp_path / "pickles"), tmp_path / "weights" / "dit-xl-2-256"
    code, said, err = command("import", "--from", source, "--out", out)
    assert code == 0 and "transformer, vae" in said, err
    same = load_pretrained(str(save("dit", tmp_path / "plain")))[1]
    found = load_pretrained(str(out))[1]
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), found.parameters(), strict=True))
    assert Autoencoder(source=str(out)).load().model.config.latent_channels == 4
    assert not list(out.rglob("*.bin"))
    monkeypatch.setenv("FLOWMAP_WEIGHTS", str(tmp_path / "weights"))
    assert find_card("dit-xl-2-256").source == str(out)
    code, _, err = command("import", "--from", tmp_path / "plain", "--out", tmp_path / "again")
    assert code == 2 and "has no pickles" in err
    (source / "vae" / "diffusion_pytorch_model.bin").write_bytes(
        pickle.dumps(Bomb(os.system, f"touch {tmp_path / 'executed'}"))
    )
    code, _, err = command("import", "--from", source, "--out", tmp_path / "third")
    assert (
        code == 2
        and "nothing was executed" in err
        and len(err.splitlines()) == 1
        and not (tmp_path / "executed").exists()
    )
    assert not (tmp_path / "third").exists() and not list(tmp_path.glob(".third*"))
