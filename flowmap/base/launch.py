"""How the processes of one command were started: by torchrun, by srun, by flowmap itself, or as a single one."""

from __future__ import annotations

import atexit
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from flowmap.base.distributed import on_gpus

INTERACTIVE = ("bash", "interactive")  # names of SLURM jobs whose commands are typed, not started by srun
GRACE = 15.0  # seconds in which the processes of a command end after the first one has


@dataclass(frozen=True)
class Launch:
    """One of `world` processes, of which `local_world` run on each machine.

    by: the program that started them, "" for a single process, and "nodes" for the first process on each of several
    machines, which starts the others there. address and port: where the first process can be reached.
    """

    by: str = ""
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    address: str = "127.0.0.1"
    port: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def node(self) -> int:
        return self.rank // self.local_world

    def device(self, accelerator: str) -> str:
        """The device of this process outside a Lightning trainer, for a recipe's trainer.accelerator."""
        if not on_gpus(accelerator):
            return "cpu"
        # srun --gpus-per-task=1 shows each process one device, under the number 0
        return "cuda" if self.world == 1 else f"cuda:{self.local_rank % torch.cuda.device_count()}"


def launch_of(env: Mapping[str, str]) -> Launch:
    """Read the environment variables of the program that started this process."""
    if "TORCHELASTIC_RUN_ID" in env:
        return _numbered("torchrun", env)
    if _started_by_srun(env):
        return _of_srun(env)
    if "RANK" in env and "WORLD_SIZE" in env:
        return _numbered("the launcher", env)
    if int(env.get("NODE_RANK", "0")) or "MASTER_ADDR" in env:
        address, port = env.get("MASTER_ADDR", "127.0.0.1"), int(env.get("MASTER_PORT", "29500"))
        return Launch("nodes", int(env.get("NODE_RANK", "0")), address=address, port=port)
    return Launch()


def _numbered(by: str, env: Mapping[str, str]) -> Launch:
    world = int(env["WORLD_SIZE"])
    local = int(env.get("LOCAL_RANK", "0")), int(env.get("LOCAL_WORLD_SIZE", world))
    where = env.get("MASTER_ADDR", "127.0.0.1"), int(env.get("MASTER_PORT", "29500"))
    return Launch(by, int(env["RANK"]), world, *local, *where)


def _started_by_srun(env: Mapping[str, str]) -> bool:
    """A batch script has no step; a shell that srun started has one, and the job has the name of a typed one."""
    return {"SLURM_STEP_ID", "SLURM_PROCID"} <= env.keys() and env.get("SLURM_JOB_NAME") not in INTERACTIVE


def _of_srun(env: Mapping[str, str]) -> Launch:
    world = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)
    nodes = int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or 1)
    named = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or "127.0.0.1"
    job, step = (int(env.get(name) or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return Launch(
        "srun",
        int(env["SLURM_PROCID"]),
        world,
        int(env.get("SLURM_LOCALID") or 0),
        max(world // nodes, 1),
        env.get("MASTER_ADDR") or first_node(named),
        int(env.get("MASTER_PORT") or 15_000 + (job + step) % 10_000),
    )


def first_node(nodes: str) -> str:
    """The first host of SLURM's list: `a[003-006,9],b1` is a003, ..."""
    name = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", name)


def start_others(launch: Launch, devices: int, nodes: int, ended: Callable[[int], None]) -> Launch:
    """Start this command again for each other device of this machine; returns this process's own number.

    A child that fails calls ended(status) in a thread of this process, if this one does not end by itself in GRACE
    seconds. At the end of this process its children end too.
    """
    if nodes > 1 and launch.by != "nodes":
        how = "srun or torchrun, or MASTER_ADDR, MASTER_PORT and NODE_RANK in the environment of each machine's process"
        raise ValueError(f"trainer.num_nodes: {nodes} machines want {how}")
    command, node = same_command(), int(os.environ.get("NODE_RANK", "0"))
    port = launch.port if launch.by else free_port()
    all_of = Launch("flowmap", node * devices, devices * nodes, 0, devices, launch.address, port)
    threads = str(max((os.cpu_count() or 1) // devices, 1))  # otherwise each takes all cores
    children = []
    for local in range(1, devices):
        env = {"OMP_NUM_THREADS": threads, **os.environ, **environment_of(all_of, local)}
        children.append(subprocess.Popen(command, env=env))
    os.environ.update(environment_of(all_of, 0))
    threading.Thread(target=_observe, args=(children, ended), daemon=True, name="flowmap-children").start()
    atexit.register(_end, children)
    return all_of


def environment_of(launch: Launch, local: int) -> dict[str, str]:
    """The variables by which a process that flowmap started knows its number."""
    number = {"RANK": launch.node * launch.local_world + local, "LOCAL_RANK": local, "NODE_RANK": launch.node}
    worlds = {"WORLD_SIZE": launch.world, "LOCAL_WORLD_SIZE": launch.local_world}
    where = {"MASTER_ADDR": launch.address, "MASTER_PORT": launch.port}
    return {name: str(value) for name, value in {**number, **worlds, **where}.items()}


def _observe(children: list[subprocess.Popen], ended: Callable[[int], None]) -> None:
    while not (failed := [child.returncode for child in children if child.poll()]):
        if all(child.returncode == 0 for child in children):
            return
        time.sleep(1)
    time.sleep(GRACE)
    _end(children, 0)
    ended(failed[0])


def _end(children: list[subprocess.Popen], seconds: float = GRACE) -> None:
    """Wait for the children, and kill those that do not end."""
    until = time.monotonic() + seconds
    for child in children:
        try:
            child.wait(max(until - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            child.kill()


def same_command() -> list[str]:
    """The command of this process. Raises ValueError in a notebook, which has none."""
    import __main__

    if __main__.__spec__ is not None:
        return [sys.executable, "-m", __main__.__spec__.name, *sys.argv[1:]]
    if not os.path.isfile(sys.argv[0]):
        raise ValueError("trainer.devices: several processes want a command or a script; here is neither")
    return [sys.executable, os.path.abspath(sys.argv[0]), *sys.argv[1:]]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
