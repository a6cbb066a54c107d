"""Weights merged into a student: W + alpha (custom - base) and W + scale (alpha / rank) B A, bit-equal.

Tensors that do not fit are reported or refused.
"""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from flowmap.base.files import read_tensors, write_tensors
from flowmap.export.merge import STAMP, merge
from flowmap.nets import MLP, Stacked
from flowmap.nets.auxiliary import ConvPrior
from flowmap.samplers import Deterministic
from flowmap.student.config import Pixels, StudentConfig
from flowmap.student.folder import load_student, save_student
from flowmap.student.prior import PRIOR, PriorConfig, Shipped, save_prior
from flowmap.student.student import Student
from tests.conftest import bytes_of
from tests.support.oracle import draw


def saved(folder, spec=MLP(width=16, depth=1), *, seed=0, arrival=True, shape=(2,), prior=None):  # noqa: B008
    torch.manual_seed(seed)
    config = StudentConfig(
        spec, Deterministic(), shape, samples=Pixels(clamp=False), arrival=arrival, prior=prior, recipe="mine", step=9
    )
    student = Student(config, config.build().eval(), folder)
    save_student(folder, config, student.flow_map.state_dict(), recipe="", card="# mine\n")
    return folder


@pytest.fixture
def three(tmp_path):
    """A flow map, a base and a finetune of it without arrival branches."""
    return (
        saved(tmp_path / "student"),
        saved(tmp_path / "base", seed=1, arrival=False),
        saved(tmp_path / "custom", seed=2, arrival=False),
    )


def weights(folder):
    return read_tensors(folder / "model.safetensors")


def test_the_difference_is_added_to_the_bit_and_branches_stay(three, tmp_path, command):
    student, base, custom = three
    options = ["--delta", custom, "--base", base, "--alpha", "0.5"]
    code, out, err = command("merge", "--student", student, *options, "--strict", "--out", tmp_path / "out")
    assert code == 0 and "tensors of the student changed" in out and str(tmp_path / "out") in out, err
    before, after, one, other = (weights(folder) for folder in (student, tmp_path / "out", custom, base))
    for name, value in before.items():
        expected = value + 0.5 * (one[name] - other[name]) if name in one else value
        assert torch.equal(after[name], expected), name
        assert (name in one) == ("arrival" not in name)
    loaded = load_student(tmp_path / "out")
    assert loaded.config == load_student(student).config and loaded.sample(3).shape == (3, 2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "times 0.5" in card
        and "Not measured" in card
        and json.loads((tmp_path / "out" / STAMP).read_text())["recipe"] == "mine"
    )


def test_alpha_one_from_the_base_itself_is_the_finetune(three, tmp_path):
    _, base, custom = three
    merged = merge(load_student(base), delta=custom, base=base)
    for name, value in weights(custom).items():
        torch.testing.assert_close(merged.weights[name], value)


def test_a_stack_takes_it_twice(three, tmp_path):
    _, base, custom = three
    student = load_student(saved(tmp_path / "stack", Stacked(MLP(width=16, depth=1))))
    merged = merge(student, delta=custom, base=base)
    change = weights(custom)["net.enter.weight"] - weights(base)["net.enter.weight"]
    for part in ("first", "second"):
        key = f"net.{part}.enter.weight"
        assert torch.equal(merged.weights[key], student.flow_map.state_dict()[key] + change)
    assert len(merged.reports[0].changed) == 2 * len(weights(base))


def test_what_lies_beside_the_weights_goes_along(tmp_path, command):
    net, shape = ConvPrior(size=3, channels=(8,), groups=4), (1, 4, 4)
    student = saved(tmp_path / "student", shape=shape, prior=Shipped(3, 1.0, False, "prior", "0" * 8))
    base, custom = (
        saved(tmp_path / name, seed=seed, shape=shape, arrival=False) for seed, name in enumerate(("base", "custom"), 1)
    )
    save_prior(student / PRIOR, PriorConfig(net, shape), net.build(shape).state_dict(), {})
    write_tensors(student / "autoencoder" / "part" / "model.safetensors", {"one": torch.ones(1)})
    code, _, err = command("merge", "--student", student, "--delta", custom, "--base", base, "--out", tmp_path / "out")
    assert code == 0, err
    assert bytes_of(tmp_path / "out" / PRIOR) == bytes_of(student / PRIOR)
    assert bytes_of(tmp_path / "out" / "autoencoder") == bytes_of(student / "autoencoder")
    merged, before = load_student(tmp_path / "out"), load_student(student)
    assert merged.sample(4).shape == (4, *shape)
    drawn = [one.start(4, torch.Generator().manual_seed(0)).x1 for one in (merged, before)]
    assert torch.equal(*drawn)


def test_what_does_not_fit_is_reported_and_refused_when_strict(three, tmp_path, command):
    student, base, custom = three
    one, other = weights(custom), weights(base)
    one["net.more.weight"] = torch.zeros(2, 2)
    one["net.leave.weight"] = other["net.leave.weight"] = torch.zeros(3, 16)
    del one["net.enter.bias"], other["net.enter.bias"]
    for name, state in (("one", one), ("other", other)):
        write_tensors(tmp_path / f"{name}.safetensors", state)
    options = [
        "--student",
        student,
        "--delta",
        tmp_path / "one.safetensors",
        "--base",
        tmp_path / "other.safetensors",
        "--out",
        tmp_path / "out",
    ]
    code, out, _ = command("merge", *options)
    assert code == 0
    for says in (
        "are not in the student: more.weight",
        "have another shape there: net.leave.weight ((3, 16) there, (2, 16) here)",
        "net.enter.bias",
    ):
        assert says in out
    code, out, err = command("merge", *options, "--strict", "--overwrite")
    assert code == 2 and "--strict" in err and "3 weights do not fit: more.weight" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda f, s, b, c: ["--delta", c], "--base: the weights that --delta was trained from"),
        (lambda f, s, b, c: [], "--delta: give --delta with --base, or --lora"),
        (lambda f, s, b, c: ["--delta", f / "nowhere", "--base", b], "--delta: .*nowhere' is no folder"),
        (lambda f, s, b, c: ["--delta", c, "--base", c], "hold the same weights: nothing would change"),
        (
            lambda f, s, b, c: ["--delta", other(f), "--base", other(f, 1)],
            "none of its 1 weights fits the student: the first is 'strange.weight'",
        ),
        (
            lambda f, s, b, c: ["--delta", pickled(f), "--base", b],
            "holds no diffusion_pytorch_model.*bin is a pickle and is not read",
        ),
        (lambda f, s, b, c: ["--lora", pickled(f) / "diffusion_pytorch_model.bin"], "is a pickle, not safetensors"),
        (lambda f, s, b, c: ["--lora", c / "model.safetensors"], "--lora: .* is no weight of a LoRA"),
    ],
)
def test_mistakes_are_named_in_one_line_and_nothing_is_written(make, says, three, tmp_path, command):
    import re

    code, out, err = command("merge", "--student", three[0], *make(tmp_path, *three), "--out", tmp_path / "out")
    assert code == 2 and re.search(says, err) and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


def other(folder, value=0):
    save_file({"strange.weight": torch.full((3, 3), float(value))}, folder / f"strange{value}.safetensors")
    return folder / f"strange{value}.safetensors"


def pickled(folder):
    (folder / "unet").mkdir()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    return folder / "unet"


def test_nothing_is_overwritten_unasked(three, tmp_path, command):
    student, base, custom = three
    options = ["--student", student, "--delta", custom, "--base", base, "--out"]
    before = bytes_of(base)
    code, _, err = command("merge", *options, base, "--overwrite")
    assert code == 2 and "no merge of flowmap's" in err and bytes_of(base) == before
    assert command("merge", *options, tmp_path / "out")[0] == 0
    code, _, err = command("merge", *options, tmp_path / "out")
    assert code == 2 and "holds an earlier merge of 'mine'; --overwrite replaces it" in err
    first = weights(tmp_path / "out")["net.enter.weight"]
    assert command("merge", *options, tmp_path / "out", "--overwrite", "--alpha", "2")[0] == 0
    assert not torch.equal(weights(tmp_path / "out")["net.enter.weight"], first)


# ---------------------------------------------------------------- LoRA


def factors(seed=0, rank=3):
    return draw(rank, 16, seed=seed, dtype=torch.float32), draw(32, rank, seed=seed + 1, dtype=torch.float32)


NAMES = {
    "peft": ("base_model.model.blocks.0.first.lora_A.weight", "base_model.model.blocks.0.first.lora_B.weight", None),
    "diffusers": ("unet.blocks.0.first.lora.down.weight", "unet.blocks.0.first.lora.up.weight", None),
    "alpha": (
        "transformer.blocks.0.first.lora_A.weight",
        "transformer.blocks.0.first.lora_B.weight",
        "transformer.blocks.0.first.alpha",
    ),
    "underscored": (
        "lora_unet_blocks_0_first.lora_down.weight",
        "lora_unet_blocks_0_first.lora_up.weight",
        "lora_unet_blocks_0_first.alpha",
    ),
}


@pytest.mark.parametrize("kind", NAMES)
def test_a_lora_is_added_whatever_its_names(kind, three, tmp_path, command):
    down, up = factors()
    a, b, alpha = NAMES[kind]
    tensors = {a: down, b: up} | ({alpha: torch.tensor(6.0)} if alpha else {})
    save_file(
        tensors | {"text_encoder.q.lora_A.weight": down.clone(), "text_encoder.q.lora_B.weight": up.clone()},
        tmp_path / "lora.safetensors",
    )
    options = ["--lora", tmp_path / "lora.safetensors", "--scale", "0.5", "--out", tmp_path / "out"]
    code, out, err = command("merge", "--student", three[0], *options)
    assert (
        code == 0 and "1 tensors of the student changed" in out and "not in the student: text_encoder.q.weight" in out
    ), err
    before, after = weights(three[0]), weights(tmp_path / "out")
    ratio = 0.5 * (6 / 3 if alpha else 1)
    torch.testing.assert_close(
        after["net.blocks.0.first.weight"], before["net.blocks.0.first.weight"] + ratio * up @ down
    )
    assert all(torch.equal(after[name], value) for name, value in before.items() if name != "net.blocks.0.first.weight")
    assert command("merge", "--student", three[0], *options[:-1], tmp_path / "strict", "--strict")[0] == 2


def test_alpha_stands_in_the_metadata_or_in_the_file_beside(three, tmp_path):
    down, up = factors()
    tensors = {"unet.blocks.0.first.lora_A.weight": down, "unet.blocks.0.first.lora_B.weight": up}
    told = {"lora_adapter_metadata": json.dumps({"unet.r": 3, "unet.lora_alpha": 9})}
    save_file(tensors, tmp_path / "told.safetensors", metadata=told)
    (tmp_path / "peft").mkdir()
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 9, "use_rslora": False}))
    student = load_student(three[0])
    for path in (tmp_path / "told.safetensors", tmp_path / "peft" / "adapter_model.safetensors"):
        change = (
            merge(student, lora=path).weights["net.blocks.0.first.weight"]
            - student.flow_map.state_dict()["net.blocks.0.first.weight"]
        )
        torch.testing.assert_close(change, 3 * up @ down, rtol=1e-4, atol=1e-5)
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"use_dora": True}))
    with pytest.raises(ValueError, match="use_dora is set, which is not read"):
        merge(student, lora=tmp_path / "peft" / "adapter_model.safetensors")
    save_file({"unet.blocks.0.first.lora_A.weight": down}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="has A but not both"):
        merge(student, lora=tmp_path / "half.safetensors")


def test_an_exported_adapter_of_diffusers_is_what_peft_merges(tmp_path):
    """A UNet with a peft adapter, saved by diffusers: merging it into a student of that UNet equals peft's merge."""
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    from flowmap.nets.diffusers_model import DiffusersModel
    from flowmap.nets.pretrained import _json
    from tests.support.tiny_nets import sd, with_random_weights
    from tests.support.tiny_pipelines import ddim

    torch.manual_seed(0)
    unet = with_random_weights(sd())
    spec = DiffusersModel("UNet2DConditionModel", _json(unet.config), "DDIMScheduler", _json(ddim().config))
    config = StudentConfig(spec, Deterministic(), (4, 8, 8))
    flow_map = config.build()
    flow_map.net.model.load_state_dict(unet.state_dict())
    unet.save_pretrained(tmp_path / "base" / "unet")
    targets = ["to_q", "to_out.0", "conv1", "proj_in"]
    unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False))
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=peft.get_peft_model_state_dict(unet))
    unet.save_lora_adapter(tmp_path / "adapter")
    unet.fuse_lora()
    unet.unload_lora()
    unet.save_pretrained(tmp_path / "custom" / "unet")
    student, expected = (
        Student(config, flow_map.eval()),
        {f"net.model.{name}": value for name, value in unet.state_dict().items()},
    )
    lora = merge(student, lora=next((tmp_path / "adapter").glob("*.safetensors")))
    plain = merge(
        student, lora=tmp_path / "pytorch_lora_weights.safetensors", scale=3.0
    )  # that file says nothing of alpha
    delta = merge(student, delta=tmp_path / "custom", base=tmp_path / "base", strict=True)
    assert any("conv1" in name for name in lora.reports[0].changed)
    for merged in (lora, plain, delta):
        for name, value in expected.items():
            torch.testing.assert_close(merged.weights[name], value, rtol=1e-4, atol=1e-5)
