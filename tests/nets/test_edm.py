"""EDM's networks: sizes as published, outputs as in the original implementation, and the dual forward works."""

import zlib
from dataclasses import replace
from functools import cache

import pytest
import torch

from flowmap.flow.derivative import eulerian_derivative, lagrangian_derivative
from flowmap.nets.edm import ADM, DDPMpp
from flowmap.nets.edm_unet import Block, resized, square_filter
from flowmap.nets.flow_map import FlowMapNet, start_from
from flowmap.nets.preconditioning import SIGMA_MAX, SIGMA_MIN
from tests.support import parity

SONG = {"channels": 32, "multipliers": (1, 2, 2), "num_blocks": 2, "attention_at": (8,)}
SMALL = {
    "ddpmpp": DDPMpp(**SONG),
    "ncsnpp": DDPMpp(**SONG, ncsnpp=True),
    "adm": ADM(channels=64, multipliers=(1, 2), num_blocks=1, attention_at=(16, 8)),
}
SHAPE = (3, 16, 16)
families = pytest.mark.parametrize(
    "family", ["ddpmpp", pytest.param("ncsnpp", marks=pytest.mark.slow), pytest.param("adm", marks=pytest.mark.slow)]
)


@pytest.mark.parametrize(
    ("spec", "side", "classes", "published"),
    [
        (DDPMpp(), 32, None, 55_733_891),
        (DDPMpp(), 32, 10, 55_735_299),
        (DDPMpp("ffhq"), 64, None, 61_805_571),
        (DDPMpp(ncsnpp=True), 32, 10, 56_400_643),
        (DDPMpp("afhqv2", ncsnpp=True), 64, None, 62_761_091),
        (ADM(), 64, 1000, 295_899_267),
    ],
)
def test_parameter_counts_are_the_published_ones(spec, side, classes, published):
    """As in the original implementation; all but ADM had nine augmentation labels, without weights here."""
    with torch.device("meta"):
        net = spec.build((3, side, side), num_classes=classes, arrival=False)
    augmentation = 0 if isinstance(spec, ADM) else 9 * net.model.map_layer0.in_features
    assert sum(p.numel() for p in net.parameters()) + augmentation == published


def drawn(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A weight by a formula of its name, so that the original implementation can be given the same."""
    if name.endswith("resample_filter"):
        return tensor
    noise = torch.randn(
        tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())), dtype=torch.float64
    )
    if name.endswith("freqs"):
        return noise
    if "norm" in name:
        return name.endswith("weight") + 0.3 * noise
    return 0.3 * noise if tensor.ndim == 1 else noise / tensor[0].numel() ** 0.5


def filled(family: str, **more) -> torch.nn.Module:
    """The small network of that family, float64, every published layer drawn."""
    net = SMALL[family].build(SHAPE, num_classes=10, **{"arrival": False, **more})
    net.model.load_state_dict({name: drawn(name, tensor) for name, tensor in net.model.state_dict().items()})
    return net.double().eval()


# (x - D) / t at indices 0, 100, ..., 700: D is the original EDMPrecond in float64 without augmentation labels,
# computed once with weights `drawn` and these inputs
ORIGINAL = {
    "ddpmpp": [
        [-0.133686, 0.112408, -0.181243, -1.655576, -1.623181, 0.728975, -1.371374, 1.776333],
        [0.656583, -0.558211, -0.162139, -2.621338, 0.861184, 0.325525, -1.331723, 0.389900],
        [0.998636, -0.893910, -0.773026, 1.670096, -0.877211, -0.295776, 1.221443, -1.012301],
        [0.154987, 0.851276, 0.118448, -0.736541, 0.041647, -2.179113, 0.040814, 0.811858],
    ],
    "ncsnpp": [
        [-0.086736, 0.125368, -0.089679, -1.746038, -1.686585, 0.864336, -1.169850, 1.791120],
        [0.649230, -0.217795, 0.165064, -2.648126, 0.777006, 0.408131, -1.506980, 0.210634],
        [1.016956, -0.576078, -0.788460, 1.881984, -0.838919, -0.214063, 1.369759, -0.961277],
        [0.259145, 0.805093, 0.051905, -0.815763, -0.029609, -2.185855, 0.078175, 0.883109],
    ],
    "adm": [
        [-0.241804, 0.731004, -0.118589, -0.908842, -1.023564, 1.096541, -2.265273, 1.094175],
        [0.362456, 0.740917, 0.202885, -0.017097, 0.560162, 0.151737, -1.460903, -0.297951],
        [0.996039, -0.295527, -0.474115, 1.852375, -0.684474, 0.291716, 0.934543, -1.065330],
        [0.025174, 1.281941, 0.577835, -0.266204, 0.169704, -1.866785, -0.569298, 0.263273],
    ],
}


def inputs():
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return x, torch.tensor([0.01, 0.3, 0.7, 0.98], dtype=torch.float64), torch.tensor([0, 3, 9, -1])


@families
def test_the_output_is_the_original_implementations(family):
    x, t, label = inputs()
    with torch.no_grad():
        out = filled(family)(x, t, t, {"class": label})
        rounded = filled(family).float()(x.float(), t.float(), t.float(), {"class": label})
    original = torch.tensor(ORIGINAL[family], dtype=torch.float64)
    torch.testing.assert_close(out.flatten(1)[:, 0:701:100], original, rtol=0, atol=1e-6)  # figures of six places
    torch.testing.assert_close(rounded.flatten(1)[:, 0:701:100], original.float(), rtol=0, atol=1e-4)


def student_of(family):
    """(teacher's map, student's at step 0), float32."""
    teacher = FlowMapNet(filled(family).float())
    student = FlowMapNet(SMALL[family].build(SHAPE, num_classes=10, arrival=True, guidance=True)).eval()
    start_from(student, teacher)
    return teacher, student


def points():
    """(x, t, s, conditions) at which a student is asked, float32."""
    x, t, label = inputs()
    return x.float(), t.float(), 0.3 * t.float(), {"class": label, "guidance": torch.tensor([1.0, 2.0, 3.0, 1.5])}


def from_its_teacher(family):
    """The student at step 0 against its teacher: see parity.at_start."""
    teacher, student = student_of(family)
    return parity.at_start(student, teacher, *points())


@families
def test_a_student_starts_as_its_teacher(family):
    assert from_its_teacher(family) == 0


@families
def test_a_student_listens_to_both_branches(family):
    (teacher, student), (x, t, s, cond) = student_of(family), points()
    with torch.no_grad():
        v = teacher.mean_velocity(x, t, t, cond)
        for branch in (student.net.arrival, student.net.guidance):
            torch.nn.init.normal_(branch.out.weight)
            assert not torch.equal(student.mean_velocity(x, t, s, cond), v)
            torch.nn.init.zeros_(branch.out.weight)


def from_its_scheduler(family):
    """Euler with our velocity against diffusers' EDM scheduler, guidance on: see parity.of_edm_steps."""
    net, (x, _, label) = filled(family).float(), inputs()
    return parity.of_edm_steps(net, net.model, x.float(), label.clamp(min=0), guidance=2.5)


@families
def test_euler_on_the_schedulers_grid_is_the_scheduler(family):
    assert from_its_scheduler(family) < 1e-4


@families
def test_it_is_finite_and_steady_at_both_ends(family):
    net = filled(family)
    x, _, label = inputs()
    at = lambda t: net(x, torch.full((4,), t).double(), torch.zeros(4).double(), {"class": label})
    with torch.no_grad():
        for end, known in ((0.0, SIGMA_MIN / (1 + SIGMA_MIN)), (1.0, SIGMA_MAX / (1 + SIGMA_MAX))):
            assert at(end).isfinite().all()
            assert (at(end) - at(known)).abs().max() < 0.1 * at(end).abs().max()
        # t = 0: v = -x - U(x / sd, log(sigma_min) / 4);  t = 1: v = x - sd U(x, log(sigma_max) / 4)
        labels = torch.nn.functional.one_hot(label + 1, 11)[:, 1:].double()
        unet = lambda x, sigma: net.model(x, torch.full((4,), sigma).double().log() / 4, labels, None)
        torch.testing.assert_close(at(0.0), -x - unet(2 * x, SIGMA_MIN))
        torch.testing.assert_close(at(1.0), x - 0.5 * unet(x, SIGMA_MAX))


@cache
def moved(family, mode):
    """(F, dF/dt along a velocity) and (F, dF/ds) of a student with loud branches, float64."""
    torch.manual_seed(0)
    net = FlowMapNet(filled(family, arrival=True, guidance=True))
    for branch in (net.net.arrival, net.net.guidance):
        torch.nn.init.normal_(branch.out.weight, std=0.1)
    x, t, label = inputs()
    s, v = 0.3 * t, torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cond = {"class": label, "guidance": torch.linspace(1, 3, 4).double()}
    return eulerian_derivative(net, x, t, s, v, cond, mode=mode), lagrangian_derivative(net, x, t, s, cond, mode=mode)


def rates(family, mode):
    return [rate for _, rate in moved(family, mode)]


def from_the_reference_tangent(family):
    """The dual tangents against torch.func.jvp, float64: see parity.of_rates."""
    return parity.of_rates(rates(family, "dual"), rates(family, "forward"))


@families
def test_the_tangent_rides(family):
    assert from_the_reference_tangent(family) < 1e-9
    for ridden, exact in zip(moved(family, "dual"), moved(family, "forward"), strict=True):
        assert torch.equal(ridden[0], exact[0]) and ridden[0].requires_grad
    # a one-sided difference of 1e-7, rates of 1e2 at t = 0.01
    assert parity.of_rates(rates(family, "difference"), rates(family, "forward")) < 1e-4


@families
def test_checkpointing_and_bfloat16_change_nothing_but_rounding(family):
    net = filled(family).float()
    x, t, label = inputs()
    x, t, cond = x.float(), t.float(), {"class": label}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        kept, every = net(x, t, t, cond), len(saved)
        net.activation_checkpointing = True
        assert net.activation_checkpointing and torch.equal(net(x, t, t, cond), kept)
    assert len(saved) - every < every / 2
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = net(x, t, t, cond)
    rows = net.to(torch.bfloat16)(x.bfloat16(), t, t, cond)
    for out in (mixed, rows):
        assert (out - kept).norm() < 0.05 * kept.norm()


@families
def test_a_new_network_says_little(family):
    """Residual branches end in zeros: U is near zero, and v is that of Gaussian data with std sigma_data."""
    torch.manual_seed(0)
    net = SMALL[family].build(SHAPE, num_classes=10)
    x, t, label = inputs()
    with torch.no_grad():
        out = net.model(x.float(), t.float(), torch.zeros(4, 10), None)
        emb = torch.randn(4, net.model.map_layer1.out_features)
        for block in (block for block in net.model.enc.values() if isinstance(block, Block) and block.skip is None):
            h = torch.randn(4, block.conv1.in_channels, 4, 4)
            kept = h * (block.scale**2 if block.heads else block.scale)
            torch.testing.assert_close(block(h, emb), kept, rtol=1e-3, atol=1e-3)
    assert out.abs().max() < 1e-3


@families
def test_dropout_is_for_training_alone(family):
    plain, x_t = filled(family).float(), [v.float() for v in inputs()[:2]]
    net = replace(SMALL[family], dropout=0.3).build(SHAPE, num_classes=10, arrival=False)
    net.load_state_dict(plain.state_dict())
    once = lambda seed: (torch.manual_seed(seed), net(*x_t, x_t[1], {"class": inputs()[2]}))[1]
    assert torch.equal(net.eval() and once(0), plain(*x_t, x_t[1], {"class": inputs()[2]}))
    net.train()
    assert torch.equal(once(0), once(0)) and not torch.equal(once(0), once(1))
    kept = once(0)
    net.activation_checkpointing = True
    first, again = (torch.autograd.grad(once(0).square().sum(), net.model.map_layer0.weight)[0] for _ in range(2))
    assert torch.equal(once(0), kept) and torch.equal(first, again)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_a_constant_stays_itself_at_twice_and_half_the_size(taps):
    x = torch.full((1, 2, 8, 8), 3.0)
    inner = (..., slice(2, -2), slice(2, -2))  # the margin is zeros
    for way, side in (("up", 16), ("down", 4)):
        out = resized(x, square_filter(taps), way)
        assert out.shape == (1, 2, side, side)
        middle = out[inner] if way == "up" else out[..., 1:-1, 1:-1]
        torch.testing.assert_close(middle, torch.full_like(middle, 3.0))


@pytest.mark.parametrize(
    ("spec", "settings", "says"),
    [
        (DDPMpp, {"preset": "cifar100"}, "preset: 'cifar100' is not one of cifar10, ffhq, afhqv2"),
        (DDPMpp, {"channels": 48}, "channels: 48 must be a multiple of 32"),
        (DDPMpp, {"multipliers": ()}, "multipliers"),
        (DDPMpp, {"num_blocks": 0}, "num_blocks: 0"),
        (ADM, {"channels": 32}, "channels: 32 must be a multiple of 64"),
        (ADM, {"sigma_data": 0.0}, "sigma_data: 0.0"),
        (ADM, {"dropout": 1.0}, r"dropout: 1.0 must lie in \[0, 1\)"),
    ],
)
def test_mistakes_are_named(spec, settings, says):
    with pytest.raises(ValueError, match=says):
        spec(**settings)
    for shape in ((3, 36, 34), (3, 18, 18), (32, 32)):
        with pytest.raises(ValueError, match="do not halve a square sample"):
            spec(multipliers=(1, 1, 1)).build(shape)
