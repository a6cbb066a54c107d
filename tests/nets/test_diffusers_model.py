"""The diffusers adapter: Euler on a scheduler's grid gives the scheduler's sample, and students start as their teacher.

Real architectures with small random weights; nothing is downloaded.
"""

from __future__ import annotations

import copy
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from flowmap.flow.derivative import eulerian_derivative, lagrangian_derivative
from flowmap.nets.diffusers_calls import CALLS, pack, unpack
from flowmap.nets.diffusers_model import DiffusersModel, DiffusersNet, clock_of
from flowmap.nets.discriminator_features import row_of_blocks
from flowmap.nets.flow_map import FlowMapNet, start_from
from flowmap.nets.pretrained import load_pretrained
from flowmap.nets.second_time import SecondTime
from flowmap.teachers.guidance import Autoguidance, ClassifierFree
from flowmap.teachers.network import NetworkTeacher
from tests.support import parity, tiny_nets
from tests.support.tiny_nets import dit, flux, pixart, qwen, sana, sd, sd3, sdxl, unet, with_random_weights

diffusers = pytest.importorskip("diffusers")
B, W = 2, 2.5


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


TEXT = {"text": numbers(B, 5, 32)}
BOTH = TEXT | {"pooled": numbers(B, 24)}
SIZE = BOTH | {"size": torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(B, 6)}
EMPTY = {"text": numbers(1, 5, 32) + 1, "pooled": numbers(1, 24) + 1, "size": SIZE["size"][:1]}
SOME = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]) > 0
# name -> (network, conditions, shape, kinds of schedule)
FAMILIES = {
    "DiT": (dit, {"class": torch.tensor([3, 7])}, (4, 8, 8), ("epsilon",)),
    "UNet2D": (unet, {}, (3, 16, 16), ("epsilon", "sample", "v_prediction")),
    "SD": (sd, TEXT, (4, 8, 8), ("epsilon", "v_prediction")),
    "SDXL": (sdxl, SIZE, (4, 8, 8), ("epsilon",)),
    "PixArt": (pixart, TEXT, (4, 8, 8), ("epsilon",)),
    "SD3": (sd3, BOTH, (4, 8, 8), ("flow",)),
    "Flux": (flux, BOTH, (4, 8, 8), ("flow",)),
    "Sana": (sana, TEXT, (4, 8, 8), ("flow",)),
    "QwenImage": (qwen, TEXT | {"text_mask": torch.ones(B, 5, dtype=torch.bool)}, (4, 8, 8), ("flow",)),
    "FLUX.2": (tiny_nets.flux2, TEXT, (4, 8, 8), ("flow",)),
    "HunyuanImage": (tiny_nets.hunyuan_image, TEXT | {"text_mask": SOME}, (4, 8, 8), ("flow",)),
    "Lumina 2": (tiny_nets.lumina2, TEXT | {"text_mask": SOME}, (4, 8, 8), ("flow",)),
    "AuraFlow": (tiny_nets.aura_flow, TEXT, (4, 8, 8), ("flow",)),
    "Z-Image": (tiny_nets.z_image, TEXT | {"text_mask": SOME}, (4, 8, 8), ("flow",)),
}
BY_DIFFERENCES = ("UNet2D",)
ROWS = [(name, kind) for name, row in FAMILIES.items() for kind in row[3]]
rows = pytest.mark.parametrize(("family", "kind"), ROWS)


def made(make):
    torch.manual_seed(0)
    return with_random_weights(make()).eval()


def scheduler_of(kind):
    if kind == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=kind, clip_sample=False
    )


def theirs(net, cond, state, time):
    """The network as its pipeline calls it, with guidance, without the channels of a learned variance."""
    call, time = CALLS[type(net).__name__], torch.full((B,), float(time))
    without = {key: EMPTY[key].expand(B, *EMPTY[key].shape[1:]) for key in cond if key in EMPTY}
    without |= {"class": torch.tensor([-1, -1])} if "class" in cond else {}
    without |= {"text_mask": cond["text_mask"][:1].expand(B, -1)} if "text_mask" in cond else {}
    with torch.no_grad():
        yes, no = (call(net, state, time, given) for given in (cond, without))
    return (no + W * (yes - no))[:, : state.shape[1]]


def teacher_of(net, scheduler, empty=None):
    ours = DiffusersNet(net, *clock_of(scheduler), arrival=False, guidance=False)
    ours.empty = empty or {}
    return NetworkTeacher(FlowMapNet(ours))


def from_its_scheduler(family, kind):
    """Euler with our velocity on the scheduler's grid against its own steps, guidance on: see parity.of_steps."""
    make, cond, shape, _ = FAMILIES[family]
    net, scheduler = made(make), scheduler_of(kind)
    scheduler.set_timesteps(6)
    empty = {key: EMPTY[key] for key in cond if key in EMPTY} | (
        {"text_mask": cond["text_mask"][:1]} if "text_mask" in cond else {}
    )
    teacher, guided = ClassifierFree(teacher_of(net, scheduler, empty)), cond | {"guidance": torch.full((B,), W)}
    if kind == "flow":
        grid, sizes = [float(sigma) for sigma in scheduler.sigmas], [1.0] * 7
    else:
        bars = [float(scheduler.alphas_cumprod[k]) for k in scheduler.timesteps] + [1.0]
        sizes = [bar**0.5 + (1 - bar) ** 0.5 for bar in bars]
        grid = [(1 - bar) ** 0.5 / size for bar, size in zip(bars, sizes, strict=True)]
    ways = {
        "predict": lambda state, time: theirs(net, cond, state, time),
        "velocity": lambda x, t: teacher.velocity(x, t, guided),
    }
    return parity.of_steps(scheduler, grid, sizes, numbers(B, *shape), **ways)


@rows
def test_euler_on_the_schedulers_grid_is_the_scheduler(family, kind):
    assert from_its_scheduler(family, kind) < 1e-4


def test_every_known_network_is_tested():
    assert {type(made(row[0])).__name__ for row in FAMILIES.values()} == set(CALLS)


def student_of(family, kind):
    """(teacher's map, student's map at step 0), both on that kind of schedule."""
    net, scheduler = made(FAMILIES[family][0]), scheduler_of(kind)
    spec = DiffusersModel(
        type(net).__name__, json.dumps(dict(net.config)), type(scheduler).__name__, json.dumps(dict(scheduler.config))
    )
    teacher = FlowMapNet(DiffusersNet(net, *clock_of(scheduler), arrival=False, guidance=False)).eval()
    student = FlowMapNet(spec.build((), arrival=True, guidance=True)).eval()
    start_from(student, teacher)
    return teacher, student


def loud(student):
    for branch in (student.net.arrival, student.net.guidance):
        torch.nn.init.normal_(last_of(branch), std=0.1)
    return student


def last_of(branch):
    return branch.linear_2.weight if isinstance(branch, SecondTime) else branch.out.weight


def points(family):
    """(x, t, s, conditions) at which a student of that family is asked."""
    _, cond, shape, _ = FAMILIES[family]
    return (
        numbers(B, *shape),
        torch.tensor([0.3, 0.8]),
        torch.tensor([0.1, 0.5]),
        cond | {"guidance": torch.tensor([1.0, 2.0])},
    )


def from_its_teacher(family, kind):
    """The student at step 0 against its teacher: see parity.at_start."""
    teacher, student = student_of(family, kind)
    return parity.at_start(student, teacher, *points(family))


@rows
def test_a_student_starts_as_its_teacher(family, kind):
    assert from_its_teacher(family, kind) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_listens_to_both_branches(family):
    _, cond, _, kinds = FAMILIES[family]
    (x, t, s, w), student = points(family), loud(student_of(family, kinds[0])[1])
    with torch.no_grad():
        first = student.mean_velocity(x, t, s, w)
        assert not torch.equal(first, student.mean_velocity(x, t, t, w))
        assert not torch.equal(first, student.mean_velocity(x, t, s, cond | {"guidance": torch.tensor([3.0, 1.0])}))
        other = copy.deepcopy(student)  # as the average of the weights is made: it listens to its own branches
        torch.nn.init.zeros_(last_of(student.net.arrival))
        assert torch.equal(other.mean_velocity(x, t, s, w), first)


def from_the_reference_tangent(family, kind):
    """The dual tangents along t and s in float64 against torch.func.jvp, or differences for UNet2D with its group norm.

    diffusers embeds time in float32, at high frequencies of a clock of 1000: a difference along t is rough.
    """
    x, t, s, cond = points(family)
    v = 0.5 * x.double()
    x, t, s, *values = (value.double() if value.is_floating_point() else value for value in (x, t, s, *cond.values()))
    student, cond = loud(student_of(family, kind)[1]).double(), dict(zip(cond, values, strict=True))
    rates = lambda mode: (
        eulerian_derivative(student, x, t, s, v, cond, mode=mode)[1],
        lagrangian_derivative(student, x, t, s, cond, mode=mode)[1],
    )
    reference = _by_differences(student, x, t, s, v, cond) if family in BY_DIFFERENCES else rates("forward")
    return parity.of_rates(rates("dual"), reference)


@torch.no_grad()
def _by_differences(student, x, t, s, v, cond, h=2e-5):
    broadcast_time = [student.mean_velocity(x + e * v, t + e, s, cond) for e in (h, -h)]
    arrival = [student.mean_velocity(x, t, s + e, cond) for e in (h, -h)]
    return [(after - before) / (2 * h) for after, before in (broadcast_time, arrival)]


@rows
def test_the_tangent_rides_through_the_student(family, kind):
    assert from_the_reference_tangent(family, kind) < (2e-2 if family in BY_DIFFERENCES else 1e-8)


def test_a_guidance_distilled_model_reads_the_scale_itself():
    teacher = teacher_of(made(lambda: flux(guidance_embeds=True)), scheduler_of("flow"))
    x, t = numbers(B, 4, 8, 8), torch.tensor([0.3, 0.8])
    low, high = (teacher.velocity(x, t, BOTH | {"guidance": torch.full((B,), w)}) for w in (1.0, 4.0))
    assert not torch.equal(low, high)
    with pytest.raises(ValueError, match="needs 'guidance'"):
        teacher.velocity(x, t, BOTH)


def test_layers_can_be_skipped_for_autoguidance():
    strong = teacher_of(made(lambda: dit(num_layers=3)), scheduler_of("epsilon"))
    net = strong.flow_map.net
    weak = NetworkTeacher(FlowMapNet(net.without_blocks((1,))))
    assert len(net.model.transformer_blocks) == 3 and len(weak.flow_map.net.model.transformer_blocks) == 2
    x, t, cond = numbers(B, 4, 8, 8), torch.tensor([0.3, 0.8]), {"class": torch.tensor([3, 7])}
    guided = Autoguidance(strong, weak).velocity(x, t, cond | {"guidance": torch.full((B,), 2.0)})
    torch.testing.assert_close(guided, 2 * strong.velocity(x, t, cond) - weak.velocity(x, t, cond))
    with pytest.raises(ValueError, match=r"skip_blocks: \(3,\) must lie in 0..2"):
        net.without_blocks((3,))
    with pytest.raises(ValueError, match="has no transformer blocks"):
        teacher_of(made(unet), scheduler_of("epsilon")).flow_map.net.without_blocks((0,))


def test_pack_is_the_pipelines_own():
    from diffusers import FluxPipeline

    x = numbers(B, 4, 6, 8)
    tokens = FluxPipeline._pack_latents(x, B, 4, 6, 8)
    assert torch.equal(pack(x), tokens) and torch.equal(unpack(tokens, 3, 4), x)


def test_a_pipelines_folder_is_loaded(tmp_path):
    net, scheduler = made(unet), scheduler_of("v_prediction")
    diffusers.DDIMPipeline(net, scheduler).save_pretrained(tmp_path / "pipe")
    spec, loaded = load_pretrained(str(tmp_path / "pipe"))
    x, t = numbers(B, 3, 16, 16), torch.tensor([0.2, 0.9])
    expected = teacher_of(net, scheduler).velocity(x, t)
    assert torch.equal(loaded.eval()(x, t, t), expected)
    again = spec.build((3, 16, 16), arrival=False)
    again.load_state_dict(loaded.state_dict())
    assert torch.equal(again.eval()(x, t, t), expected)


@pytest.mark.parametrize(("family", "schedule"), [(dit, "epsilon"), (pixart, "epsilon")])
def test_pipelines_of_before_the_class_was_split_are_loaded(family, schedule, tmp_path):
    """The published DiT and PixArt name Transformer2DModel; its norm_type says which it is."""
    net, pipe = made(family), tmp_path / "pipe"
    kind = {"DiTTransformer2DModel": "ada_norm_zero", "PixArtTransformer2DModel": "ada_norm_single"}[type(net).__name__]
    net.save_pretrained(pipe / "transformer")
    scheduler_of(schedule).save_pretrained(pipe / "scheduler")
    settings = json.loads((pipe / "transformer" / "config.json").read_text())
    former = settings | {"_class_name": "Transformer2DModel", "norm_type": kind}
    (pipe / "transformer" / "config.json").write_text(json.dumps(former))
    index = {"_class_name": "DiTPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    (pipe / "model_index.json").write_text(json.dumps(index | {"transformer": ["diffusers", "Transformer2DModel"]}))
    spec, loaded = load_pretrained(str(pipe))
    assert spec.network == type(net).__name__ == type(loaded.model).__name__
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), net.parameters(), strict=True))
    (pipe / "transformer" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_pretrained(str(pipe))


def test_a_discriminator_finds_the_blocks_of_every_network():
    for make, *_ in FAMILIES.values():
        net = DiffusersNet(make(), *clock_of(scheduler_of("flow")), arrival=False, guidance=False)
        assert row_of_blocks(net), type(net.model).__name__


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="no diffusers pipeline is there"):
        load_pretrained(str(tmp_path))
    diffusers.DDIMPipeline(made(unet), scheduler_of("epsilon")).save_pretrained(tmp_path / "pipe")
    next((tmp_path / "pipe" / "unet").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_pretrained(str(tmp_path / "pipe"))
    with pytest.raises(ValueError, match="its clock is not known"):
        clock_of(diffusers.ScoreSdeVeScheduler())
    odd = scheduler_of("epsilon")
    odd.register_to_config(prediction_type="score")
    with pytest.raises(ValueError, match="prediction_type 'score'"):
        clock_of(odd)
    with pytest.raises(ValueError, match="UNet2DConditionModel needs 'text'; given: nothing"):
        teacher_of(made(sd), scheduler_of("epsilon")).velocity(numbers(B, 4, 8, 8), torch.tensor([0.2, 0.9]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"network": "AutoencoderKL"}, "no call is known for 'AutoencoderKL'"),
        ({"settings": "{"}, "settings: "),
        ({"settings": json.dumps({"num_layers": 10**6})}, "num_layers: 1000000 is more than"),
        ({"settings": json.dumps({"block_out_channels": [32, 10**9]})}, "block_out_channels: 1000000000"),
    ],
)
def test_a_hostile_config_is_refused(change, says):
    good = {"network": "UNet2DModel", "settings": "{}", "scheduler": "DDIMScheduler", "scheduler_settings": "{}"}
    with pytest.raises(ValueError, match=says):
        DiffusersModel(**(good | change))
