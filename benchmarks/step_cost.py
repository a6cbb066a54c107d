"""What does a training step of AYF-EMD cost, in plain flow-matching steps?  One DiT of 4 M parameters, one run.

A step is forward and backward.  The teacher's own forward passes are left out (the velocity is the conditional one):
the measured part is the derivative.  Variants are timed in turn, round after round, and compared as ratios within a
round, since machines are shared; on one thread of a CPU by its CPU time.  Saved activations are the tensors that
autograd keeps.
Compiled variants go through flow/tangent/compiled.py; step_cost_families.py times every network.
With checkouts of NVlabs/FastGen and Gsunshine/py-meanflow their MeanFlow is timed on the same network (lib/peers.py).
`python benchmarks/step_cost.py [--batch 4] [--rounds 30] [--threads 1] [--device cpu]
    [--fastgen FOLDER] [--meanflow FOLDER]`
"""

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch
from lib.peers import FastGen, PyMeanFlow, load, said_of
from lib.report import environment, table, write

from flowmap.flow.derivative import eulerian_derivative
from flowmap.flow.distance import gradient_as_target, normalise
from flowmap.flow.path import Linear
from flowmap.flow.tangent.compiled import Compiled
from flowmap.flow.times import Interval, Mixture, Uniform
from flowmap.flow.types import broadcast_time
from flowmap.nets import DiT
from flowmap.nets.flow_map import FlowMapNet
from flowmap.objectives import AYFEMD, FlowMatching, MeanFlow

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
        "meanflow, dual forward": (objective(MeanFlow()), Interval()),
        "meanflow, dual forward, 75 % diagonal": (objective(MeanFlow()), Mixture(diagonal=0.75)),
    }


MEAN_FLOW = {"power": 1.0, "offset": 1e-3}  # the weight of our MeanFlow
PEERS = {
    "FastGen's meanflow: torch.func.jvp, then a forward pass": (
        FastGen,
        lambda peer, student: peer.mean_flow(student, None, **MEAN_FLOW),
    ),
    "py-meanflow's: torch.func.jvp, joint": (PyMeanFlow, lambda peer, student: peer.mean_flow(student, **MEAN_FLOW)),
    "py-meanflow's, compiled by torch.compile": (
        PyMeanFlow,
        lambda peer, student: peer.compiled_mean_flow(student, **MEAN_FLOW),
    ),
}
"""name -> (the peer, its loss of (peer, student)).

They differentiate the whole batch: samples at t = s cost them the same as others.
"""


def peers_ways(peers: dict, student: FlowMapNet) -> dict:
    """The same of the peers that are there."""

    def way(loss):
        return lambda student, sample: loss(sample, 0, 1)

    return {name: (way(bind(peers[kind], student)), Interval()) for name, (kind, bind) in PEERS.items() if peers[kind]}


COMPILED = {
    "flow matching (plain)": "flow matching (plain), compiled",
    "ayf_emd, dual forward": "ayf_emd, compiled dual forward",
    "ayf_emd, dual forward, 25 % diagonal": "ayf_emd, compiled dual forward, 25 % diagonal",
    "meanflow, dual forward": "meanflow, compiled dual forward",
    "meanflow, dual forward, 75 % diagonal": "meanflow, compiled dual forward, 75 % diagonal",
}
"""The ways that are also timed compiled, and what they are called then."""


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


def compiled(student: FlowMapNet) -> FlowMapNet:
    """A copy of the student with a compiled network."""
    student = copy.deepcopy(student)
    student.net.forward = Compiled(student.net.forward, log=print)
    return student


def timed(students: dict, losses: dict, draw, arguments) -> dict[str, list[float]]:
    """name -> the seconds of a step in every round, after rounds that compile and warm up."""
    device = torch.device(arguments.device)
    clock = time.process_time if alone(arguments) else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for i in range(arguments.rounds + 3):
        for name, (loss, times) in losses.items():
            sample = draw(times)
            synchronise(device)
            started = clock()
            one_step(students[name], loss, sample)
            synchronise(device)
            if i >= 3:
                seconds[name].append(clock() - started)
    return seconds


def alone(arguments) -> bool:
    """Whether steps run on one thread of the CPU, whose own clock other processes do not disturb."""
    return arguments.device == "cpu" and arguments.threads == 1


def setting_of(arguments, shape: tuple[int, ...]) -> dict:
    clock = "CPU time" if alone(arguments) else "wall time"
    given = {"batch": arguments.batch, "threads": arguments.threads, "rounds": arguments.rounds}
    return {**given, "shape": shape, "clock": clock}


def ratios(times: list[float], unit: list[float]) -> tuple[float, float, float]:
    """The median and the quartiles of the ratios within a round."""
    found = sorted(a / b for a, b in zip(times, unit, strict=True))
    quarter = len(found) // 4
    return statistics.median(found), found[quarter], found[-1 - quarter]


def one_network(arguments) -> None:
    """The table of one DiT."""
    device = torch.device(arguments.device)
    student = FlowMapNet(DiT(preset="mini").build(SHAPE)).to(device)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    generator = torch.Generator(device).manual_seed(0)

    def draw(times):
        x0, x1 = (torch.randn(arguments.batch, *SHAPE, generator=generator, device=device) for _ in range(2))
        return Linear().sample(x0, x1, *times(arguments.batch, device=device, generator=generator))

    losses = ways()
    fused = {name: compiled(student) for name in COMPILED.values()}  # each for one kind of batch, as in a run
    students = dict.fromkeys(losses, student) | fused
    losses |= {COMPILED[name]: losses[name] for name in COMPILED}
    folders = {FastGen: arguments.fastgen, PyMeanFlow: arguments.meanflow}
    peers = {kind: load(kind, folder) for kind, folder in folders.items()}
    theirs = peers_ways(peers, student)
    losses, students = losses | theirs, students | dict.fromkeys(theirs, student)
    seconds = timed(students, losses, draw, arguments)
    ways_of = {name: way for name, net in fused.items() for way in net.net.forward.ways if way.graphs or way.fallbacks}
    assert not any(way.fallbacks for way in ways_of.values()), [way.stopped for way in ways_of.values()]
    bytes_of = {name: saved_bytes(students[name], loss, draw(times)) for name, (loss, times) in losses.items()}
    finish(
        arguments.name,
        {"step_cost": of_ways(seconds, bytes_of), "peers": of_peers(seconds)},
        setting_of(arguments, SHAPE),
        peers=said_of(peers),
        parameters=sum(p.numel() for p in student.parameters()),
        compile_seconds={name: way.seconds for name, way in ways_of.items()},
    )


def of_ways(seconds: dict[str, list[float]], bytes_of: dict[str, int]) -> dict:
    """The table of every way, in plain steps and in compiled ones; a peer that is not there is marked."""
    plain, plain_compiled = (seconds[name] for name in next(iter(COMPILED.items())))
    first, rows = next(iter(bytes_of.values())), []
    for name, times in seconds.items():
        of_compiled = ratios(times, plain_compiled)[0] if "compiled" in name else ""
        took = 1e3 * statistics.median(times)
        rows.append([name, *ratios(times, plain), of_compiled, took, bytes_of[name] / first])
    rows += [[name, "not there", *[""] * 5] for name in PEERS if name not in seconds]
    columns = ["way", "plain steps (median)", "lower quartile", "upper quartile", "compiled plain steps"]
    return {"columns": [*columns, "milliseconds", "activations"], "rows": rows}


def of_peers(seconds: dict[str, list[float]]) -> dict:
    """The table of each step of ours: what the peers' steps cost in such steps, median and quartiles."""
    rows = []
    for name, times in seconds.items():
        if name.startswith(("ayf_emd, dual", "ayf_emd, compiled", "meanflow")):
            cells = [
                "{:.3g} ({:.3g} to {:.3g})".format(*ratios(seconds[peer], times)) if peer in seconds else "not there"
                for peer in PEERS
            ]
            rows.append([name, *cells])
    return {"columns": ["our step", *(f"{name}, in such steps" for name in PEERS)], "rows": rows}


def finish(name: str, tables: dict[str, dict], setting: dict, **more) -> None:
    """Print the tables and write the JSON."""
    for one in tables.values():
        print(table(one["rows"], one["columns"]), end="\n\n")
    payload = {"environment": environment(), "setting": setting, **more, "tables": tables}
    write(name, {"question": __doc__.splitlines()[0], **payload})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="step_cost")
    parser.add_argument("--fastgen", type=Path, help="a checkout of NVlabs/FastGen")
    parser.add_argument("--meanflow", type=Path, help="a checkout of Gsunshine/py-meanflow")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    one_network(arguments)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
