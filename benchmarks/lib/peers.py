"""The peers' losses, imported at run time from checkouts next to the project and evaluated on our networks.

None of their code is copied here.
NVlabs/FastGen (Apache-2.0): MeanFlow and sCM.  Gsunshine/py-meanflow (CC BY-NC-SA 4.0): MeanFlow.
Their clock is ours: t = 1 is noise, r is our s.
A peer's loss draws noise first, so torch's seed that drew our noise gives the same noise there.  Times are passed in.
"""

from __future__ import annotations

import copy
import importlib
import importlib.abc
import importlib.machinery
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowmap.flow.types import Cond, PathSample, Teacher, broadcast_time
from flowmap.nets.flow_map import FlowMapNet

Loss = Callable[[PathSample, int, int], Tensor]
"""(sample, the seed that drew its noise, step) -> a scalar to descend."""

NOT_NEEDED = (
    "av",
    "boto3",
    "einops",
    "ftfy",
    "imageio",
    "loguru",
    "pynvml",
)  # what FastGen imports and these losses never call


@dataclass(frozen=True)
class Checkout:
    """A folder of theirs: its commit and the commit's date, the first line of its licence, its stubbed imports."""

    folder: Path
    commit: str | None
    date: str | None
    licence: str
    stubbed: tuple[str, ...] = ()

    @staticmethod
    def of(folder: Path, stubbed=()) -> Checkout:
        lines = [line.strip() for line in (folder / "LICENSE").read_text().splitlines() if line.strip(" =")]
        asked = lambda *words: subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True).stdout
        top = asked("rev-parse", "--show-toplevel").strip()
        its_own = bool(top) and Path(top).resolve() == folder.resolve()
        commit, date = asked("show", "-s", "--format=%H %cs", "HEAD").split() if its_own else (None, None)
        return Checkout(folder, commit, date, lines[0], tuple(stubbed))

    @property
    def state(self) -> str:
        """Its commit and date in words."""
        return f"commit {self.commit[:7]} of {self.date}" if self.commit else "an unknown commit"

    def said(self) -> dict:
        known = {"commit": self.commit, "date": self.date}
        return {**known, "licence": self.licence, "stubbed": list(self.stubbed)}


class PyMeanFlow:
    """Gsunshine/py-meanflow's MeanFlow.forward_with_loss: its published weight is power 0.75, offset 1e-3."""

    def __init__(self, folder: Path):
        sys.path.insert(0, str(folder / "meanflow"))
        try:
            self.module = importlib.import_module("models.meanflow")
        finally:
            sys.path.remove(str(folder / "meanflow"))
        self.sample_times = self.module.sample_two_timesteps
        self.checkout = Checkout.of(folder)

    def mean_flow(self, student: FlowMapNet, *, power: float, offset: float, own_times: bool = False) -> Loss:
        """own_times: the times of its script cifar10_v1.sh in place of the sample's."""
        model = self._model(student, power, offset)

        def loss(sample: PathSample, seed: int, step: int) -> Tensor:
            given = lambda args, num_samples, device: (sample.t, sample.s)
            self.module.sample_two_timesteps = self.sample_times if own_times else given
            torch.manual_seed(seed)
            return model.forward_with_loss(sample.x0, sample.cond)

        return loss

    def compiled_mean_flow(self, student: FlowMapNet, *, power: float, offset: float) -> Loss:
        """The same compiled by torch.compile, as its training does, with attention by plain products throughout."""
        drawn = SimpleNamespace(times=None)
        model = self._model(student, power, offset)
        given = lambda args, num_samples, device: drawn.times
        run = torch.compile(model.forward_with_loss, fullgraph=True, options={"fallback_random": True})

        def loss(sample: PathSample, seed: int, step: int) -> Tensor:
            self.module.sample_two_timesteps, drawn.times = given, (sample.t, sample.s)
            torch.manual_seed(seed)
            with sdpa_kernel(SDPBackend.MATH):
                return run(sample.x0, sample.cond)

        return loss

    def _model(self, student: FlowMapNet, power: float, offset: float) -> nn.Module:
        law = dict(tr_sampler="v1", P_mean_t=-0.6, P_std_t=1.6, P_mean_r=-4.0, P_std_r=1.6, ratio=0.75)
        args = SimpleNamespace(ema_decay=0.9999, ema_decays=[], norm_p=power, norm_eps=offset, **law)
        nets = iter(
            (_ForPyMeanFlow(student), copy.deepcopy(_ForPyMeanFlow(student)))
        )  # the second is its own average, which stays as it is
        return self.module.MeanFlow(lambda: next(nets), args, {})


class _ForPyMeanFlow(nn.Module):
    """Our network as theirs is called: net(z, (t, t - r), condition)."""

    def __init__(self, student: FlowMapNet):
        super().__init__()
        self.student = student

    def forward(self, z: Tensor, times: tuple[Tensor, Tensor], aug_cond: Cond | None) -> Tensor:
        t, h = times
        with _attention_for(z):
            return self.student.mean_velocity(z, t, t - h, aug_cond)


class FastGen:
    """NVlabs/FastGen's MeanFlowModel and SCMModel, without its trainer, configurations and video networks."""

    def __init__(self, folder: Path):
        with _standing_in(NOT_NEEDED) as stubbed, _found_in(folder):
            methods = types.ModuleType(
                "fastgen.methods"
            )  # its own __init__ imports every method and every video network
            methods.__path__ = [str(folder / "fastgen/methods")]
            sys.modules[methods.__name__] = methods
            methods.FastGenModel = importlib.import_module("fastgen.methods.model").FastGenModel
            methods.CMModel = importlib.import_module("fastgen.methods.consistency_model.CM").CMModel
            self.MeanFlow = importlib.import_module("fastgen.methods.consistency_model.mean_flow").MeanFlowModel
            self.SCM = importlib.import_module("fastgen.methods.consistency_model.sCM").SCMModel
            self.Network = importlib.import_module("fastgen.networks.network").FastGenNetwork
        self.checkout = Checkout.of(folder, [*stubbed, "fastgen.methods/__init__"])

    def mean_flow(self, student: FlowMapNet, teacher: Teacher | None, **settings) -> Loss:
        """settings: of its LossConfig.

        power and offset give its weight in our terms, guidance (omega, kappa) that in the target.
        """
        power, offset, (omega, kappa) = (
            settings.pop("power", 1.0),
            settings.pop("offset", 0.1),
            settings.pop("guidance", (1.0, 0.0)),
        )
        given = dict(
            use_jvp_finite_diff=False, tangent_warmup_steps=0, tangent_spatial_invariance=False, loss_type="l2"
        )
        loss_config = SimpleNamespace(
            use_cd=teacher is not None, norm_method=f"poly_{power}", norm_const=offset, **given | settings
        )
        sides = dict(
            sample_r_cfg=SimpleNamespace(enabled=False),
            guidance_mixture_ratio=kappa or None,
            guidance_t_start=0.0,
            guidance_t_end=1.0,
        )
        sides |= dict(cond_dropout_prob=0.0, cond_keys_no_dropout=[])  # None in place of 0 would drop the guidance
        config = self._config(student, teacher, loss_config, SimpleNamespace(), **sides)
        config.guidance_scale = None if omega == 1.0 else omega
        model = self.MeanFlow(config)

        def loss(sample: PathSample, seed: int, step: int) -> Tensor:
            torch.manual_seed(seed)
            cond = sample.cond
            dropped = cond and {**cond, "class": torch.full_like(cond["class"], -1)}
            return model._compute_mf_loss(sample.x0, sample.t.double(), sample.s.double(), step, cond, dropped)[
                0
            ].mean()

        return loss

    def scm(self, student: FlowMapNet, teacher: Teacher, *, sigma_data: float, warmup_steps: int, **settings) -> Loss:
        """settings: of its LossConfig, by default its own.

        Its learned log-variance, a layer of its networks, is 0: our networks have none.
        """
        given = dict(
            tangent_warmup_const=0.1,
            prior_weighting_enabled=True,
            g_norm_spatial_invariance=True,
            divide_x_0_spatial_dim=True,
        )
        given |= dict(use_cd=True, use_jvp_finite_diff=False, tangent_warmup_steps=warmup_steps) | settings
        times = SimpleNamespace(sigma_data=sigma_data, quantize=False)
        model = self.SCM(self._config(student, teacher, SimpleNamespace(**given), times))

        def loss(sample: PathSample, seed: int, step: int) -> Tensor:
            torch.manual_seed(seed)
            return model._compute_scm_loss(sample.x0, sample.t.double(), sample.cond, iteration=step)[0].mean()

        return loss

    def _config(self, student: FlowMapNet, teacher: Teacher | None, loss_config, times, **more) -> SimpleNamespace:
        """What its models read of a configuration, on the student's device in its precision, the average being ours."""
        dtype = str(next(student.parameters()).dtype).removeprefix("torch.")
        precisions = dict(
            precision=dtype, precision_amp=None, precision_amp_infer=None, precision_amp_enc=None, precision_fsdp=None
        )
        absent = dict(
            pretrained_model_path="",
            pretrained_student_net_path="",
            guidance_scale=None,
            skip_layers=None,
            precision_amp_jvp=None,
        )
        off = dict(
            use_ema=False,
            fsdp_meta_init=False,
            add_teacher_to_fsdp_dict=False,
            enable_preprocessors=False,
            load_student_weights=False,
        )
        nets = dict(
            net={"_target_": lambda: self._student(student)}, teacher={"_target_": lambda: self._teacher(teacher)}
        )
        device = str(next(student.parameters()).device)
        slots = dict(device=device, input_shape=[], sample_t_cfg=times, loss_config=loss_config)
        return SimpleNamespace(**precisions, **absent, **off, **nets, **slots, **more)

    def _student(self, student: FlowMapNet) -> nn.Module:
        def mean_velocity(x: Tensor, t: Tensor, r: Tensor | None, cond: Cond | None) -> Tensor:
            with _attention_for(x):
                return student.mean_velocity(x, t, torch.zeros_like(t) if r is None else r, cond)

        net = self._network(mean_velocity)
        net.student = student
        return net

    def _teacher(self, teacher: Teacher) -> nn.Module:
        return self._network(lambda x, t, r, cond: teacher.velocity(x, t, cond))

    def _network(self, velocity) -> nn.Module:
        """A network with the interface that its methods call: rectified flow, predicting the flow or x0.

        x0 is the sample at r, or at 0 without r.
        """

        class Net(self.Network):
            def forward(self, x_t, t, condition=None, r=None, return_logvar=False, fwd_pred_type=None, **unused):
                t, r = (
                    t.to(x_t.dtype),
                    None if r is None else r.to(x_t.dtype),
                )  # its times are float64 whatever the data
                flow = velocity(x_t, t, r, condition)
                out = x_t - broadcast_time(t, x_t) * flow if fwd_pred_type == "x0" else flow
                return (out, out.new_zeros(len(out), 1)) if return_logvar else out

        return Net(net_pred_type="flow", schedule_type="rf")


def load(kind: type, folder: Path | None):
    """The peer in that folder; None where there is none."""
    if folder is None or not folder.is_dir():
        print(f"{kind.__name__}: {folder or 'no folder given'}: not there")
        return None
    peer = kind(folder.resolve())
    print(f"{kind.__name__}: {peer.checkout.said()}")
    return peer


def said_of(peers: Mapping[type, FastGen | PyMeanFlow | None]) -> dict:
    """name -> commit, date, licence and stubs of a peer, or "not there"."""
    return {kind.__name__: peer.checkout.said() if peer else "not there" for kind, peer in peers.items()}


def _attention_for(x: Tensor):
    """Attention by plain products if x has a tangent, as FastGen requires on a GPU.

    torch's fused attention has no forward derivative on CPU.  What is compiled has it chosen outside.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH) if forward_ad.unpack_dual(x).tangent is not None else nullcontext()


class _Nothing:
    """Whatever is asked of it or called on it is it again."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args, **kwargs):
        return self


class _standing_in(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A context in which missing packages of these names are replaced by empty modules.

    It returns the list of the modules that were imported so.
    """

    def __init__(self, names: tuple[str, ...]):
        self.names, self.asked = names, []

    def __enter__(self) -> list[str]:
        sys.meta_path.append(self)  # the last to be asked: what is installed is found before
        return self.asked

    def __exit__(self, *error) -> None:
        sys.meta_path.remove(self)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.names:
            return None
        self.asked += [] if "." in name else [name]
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = _Nothing().__getattr__
        return module

    def exec_module(self, module) -> None:
        pass


class _found_in:
    """Inside, modules are looked for in that folder first."""

    def __init__(self, folder: Path):
        self.place = str(folder)

    def __enter__(self) -> None:
        sys.path.insert(0, self.place)

    def __exit__(self, *error) -> None:
        sys.path.remove(self.place)
