"""What does a training step of AYF-EMD cost, in plain flow-matching steps?  One DiT of 4 M parameters, one run.

A step is forward and backward.  The teacher's own forward passes are left out (the velocity is the conditional one):
the measured part is the derivative.  Variants are timed in turn, round after round, and compared as ratios within a
round, since machines are shared.  Saved activations are the tensors that autograd keeps.
`python benchmarks/step_cost.py [--batch 4] [--rounds 30] [--threads 1] [--device cpu]`
"""

import argparse
import statistics
import time

import torch
from lib.report import environment, table, write

from flowmap.flow.derivative import eulerian_derivative
from flowmap.flow.distance import gradient_as_target, normalise
from flowmap.flow.path import Linear
from flowmap.flow.times import Interval, Mixture, Uniform
from flowmap.flow.types import broadcast_time
from flowmap.nets import DiT
from flowmap.nets.flow_map import FlowMapNet
from flowmap.objectives import AYFEMD, FlowMatching

SHAPE = (4, 16, 16)


def ways() -> dict:
    """name -> (loss of (student, sample), the times it draws)."""

    def joint(student, sample):
        mean_velocity, rate = eulerian_derivative(student, sample.xt, sample.t, sample.s, sample.vt, mode="joint")
        g = mean_velocity.detach() - sample.vt + 0.99 * broadcast_time(sample.t - sample.s, sample.xt) * rate
        return gradient_as_target(mean_velocity, normalise(g)).mean()

    def objective(value):
        return lambda student, sample: value(student, None, sample, 1).value

    emd = {mode: objective(AYFEMD(warmup_steps=0, derivative=mode)) for mode in ("dual", "forward", "difference")}
    return {
        "flow matching (plain)": (objective(FlowMatching()), Uniform()),
        "ayf_emd, dual forward": (emd["dual"], Interval()),
        "ayf_emd, dual forward, 25 % diagonal": (emd["dual"], Mixture(diagonal=0.25)),
        "ayf_emd, one-sided difference": (emd["difference"], Interval()),
        "ayf_emd, torch.func.jvp, two passes": (emd["forward"], Interval()),
        "ayf_emd, torch.func.jvp, joint": (joint, Interval()),
    }


def one_step(student, loss, sample) -> None:
    student.zero_grad(set_to_none=True)
    loss(student, sample).backward()


def saved_bytes(student, loss, sample) -> int:
    """What autograd keeps for the backward pass, parameters apart, each storage counted once."""
    weights = {p.untyped_storage().data_ptr() for p in student.parameters()}
    shapes = {tuple(p.shape) for p in student.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        try:
            storage = tensor.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
        except RuntimeError:  # what torch.func.jvp saves is wrapped and shows no storage: told from weights by shape
            key, size = id(tensor), tensor.numel() * tensor.element_size()
            if tuple(tensor.shape) in shapes or tuple(reversed(tensor.shape)) in shapes:
                return tensor
        if key not in weights:
            kept[key] = size
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(student, sample)
    del value
    return sum(kept.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="step_cost")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    student = FlowMapNet(DiT(preset="mini").build(SHAPE)).to(device)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    generator = torch.Generator(device).manual_seed(0)

    def draw(times):
        x0, x1 = (torch.randn(arguments.batch, *SHAPE, generator=generator, device=device) for _ in range(2))
        return Linear().sample(x0, x1, *times(arguments.batch, device=device, generator=generator))

    seconds: dict[str, list[float]] = {name: [] for name in ways()}
    for i in range(arguments.rounds + 3):
        for name, (loss, times) in ways().items():
            sample = draw(times)
            synchronise(device)
            started = time.perf_counter()
            one_step(student, loss, sample)
            synchronise(device)
            if i >= 3:  # the first rounds warm up
                seconds[name].append(time.perf_counter() - started)
    plain, *_ = seconds.values()
    bytes_of = {name: saved_bytes(student, loss, draw(times)) for name, (loss, times) in ways().items()}
    first = next(iter(bytes_of.values()))
    rows = []
    for name, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(times, plain, strict=True))
        quarter = len(ratios) // 4
        rows.append(
            [
                name,
                statistics.median(ratios),
                ratios[quarter],
                ratios[-1 - quarter],
                1e3 * statistics.median(times),
                bytes_of[name] / first,
            ]
        )
    columns = ["way", "plain steps (median)", "lower quartile", "upper quartile", "milliseconds", "activations"]
    print(table(rows, columns))
    setting = {"batch": arguments.batch, "threads": arguments.threads, "rounds": arguments.rounds, "shape": SHAPE}
    parameters = sum(p.numel() for p in student.parameters())
    payload = {
        "environment": environment(),
        "setting": setting,
        "parameters": parameters,
        "columns": columns,
        "rows": rows,
    }
    write(arguments.name, {"question": __doc__.splitlines()[0], **payload})


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
