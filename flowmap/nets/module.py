"""Any torch.nn.Module as a network: net(x, t, label) as a velocity, or net(x, t, s, label) as a flow map.

The module keeps its own prediction, clock and range of data; all are converted to x1 - x0 on our clock (0 data, 1
noise) and data in [-1, 1]. A student of a plain net(x, t, label) gets an arrival branch, which starts at zero and is
added to the module's time embedding, so that at step 0 it is the teacher.
"""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from flowmap.base.ranges import Classes, CountFromZero, Positive, Range, Share, check_ranges
from flowmap.flow.clock import velocity_of
from flowmap.flow.path import wide
from flowmap.flow.types import Cond, broadcast_time
from flowmap.nets import preconditioning
from flowmap.nets.embed import ScalarEmbedding, branches
from flowmap.nets.listening import Extra, listen
from flowmap.nets.module_builders import built
from flowmap.nets.module_clock import Flow, ModuleClock, Sigma

Bound = Annotated[float, Range(-1_000_000, 1_000_000)]
PREDICTIONS = ("velocity", "x0", "epsilon", "v", "edm")
LAST_EPSILON = 0.999  # of our clock: later, predicted noise says nothing of the data


@dataclass(frozen=True)
class ModuleSettings:
    """What a module of one's own is, and how it is called.

    module          the name under which its builder was registered, or `module:Class` of an imported one
    arguments       keyword arguments of the builder, as JSON
    prediction      velocity (of its clock), x0, epsilon, v, or edm: a raw network under EDM's preconditioning
    clock           flow, reversed, ddpm or sigma, with their settings
    range           the two numbers that the module has for our -1 and 1
    first           of our clock: x0 predictions are asked no nearer to the data, where they say little of a velocity
    classes         how many labels it knows; null: it is given none
    null_class      the label that stands for no class
    time_embedding  the submodule, or the method, whose output is the time embedding, (B, ...)
    sigma_data      of edm
    weights         a file of weights: safetensors, or a state dict that torch's weights-only reader opens
    sha256          of that file, which is then checked
    digest          the fingerprint of weights that were given in Python
    """

    module: str = "???"
    arguments: str = "{}"
    prediction: str = "velocity"
    clock: ModuleClock = Flow()
    range: tuple[Bound, Bound] = (-1.0, 1.0)
    first: Share = 0.001
    classes: Classes | None = None
    null_class: CountFromZero | None = None
    time_embedding: str | None = None
    sigma_data: Positive = 0.5
    weights: str | None = None
    sha256: str | None = None
    digest: str | None = None

    def __post_init__(self):
        check_ranges(self)
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction: {self.prediction!r} is not one of {', '.join(PREDICTIONS)}")
        if self.prediction == "velocity" and not self.clock.flows:
            raise ValueError("prediction: 'velocity' wants a clock of kind flow or reversed; of others take v")
        if self.prediction == "edm" and not isinstance(self.clock, Sigma):
            raise ValueError("prediction: 'edm' wants a clock of kind sigma")
        if not self.range[0] < self.range[1]:
            raise ValueError(f"range: {self.range} must be a growing pair of numbers")
        try:
            if not isinstance(json.loads(self.arguments), dict):
                raise ValueError("is no mapping")
        except ValueError as error:
            raise ValueError(f"arguments: {self.arguments!r} is not a mapping as JSON: {error}") from error

    def settings(self) -> dict[str, Any]:
        """The settings by name, without those of the weights."""
        names = ModuleSettings.__dataclass_fields__
        return {name: getattr(self, name) for name in names if name not in ("weights", "sha256", "digest")}


@dataclass(frozen=True)
class Module(ModuleSettings):
    """A module of one's own as a network; see ModuleSettings."""

    artifact: ClassVar[str] = "student"
    holds_constants: ClassVar[bool] = True

    def build(
        self, shape: tuple[int, ...], *, num_classes: int | None = None, arrival: bool = True, guidance: bool = False
    ) -> ModuleNet:
        if num_classes and (self.classes or 0) < num_classes:
            has = "takes no label" if self.classes is None else f"has a table of {self.classes} classes"
            raise ValueError(f"classes: the data has {num_classes} classes, the module {has}")
        return ModuleNet(built(self.module, self.arguments), self, shape, arrival=arrival, guidance=guidance)


def without_source(net: Any) -> Any:
    """The settings of a network without those of the weights that a module starts from; others as they are."""
    return Module(**net.settings()) if isinstance(net, Module) else net


class ModuleNet(nn.Module):
    """F(x, t, s, cond) for x (B, *shape). The module always runs in evaluation mode."""

    model: Any

    def __init__(
        self, model: nn.Module, spec: ModuleSettings, shape: tuple[int, ...], *, arrival: bool, guidance: bool
    ):
        super().__init__()
        self.model, self.spec, self.clock, self.extra = model, spec, spec.clock.build(), Extra()
        self.takes_arrival = takes_arrival(model)
        if self.takes_arrival and (spec.prediction != "velocity" or spec.clock != Flow() or spec.range != (-1, 1)):
            raise ValueError("prediction: a module that takes s gives a mean velocity on our clock, of data in [-1, 1]")
        branch = (arrival and not self.takes_arrival) or guidance
        size = self._probe(shape, branch)
        self.arrival = ScalarEmbedding(size, silent=True) if arrival and not self.takes_arrival else None
        self.guidance = ScalarEmbedding(size, silent=True) if guidance else None
        if branch:
            listen(*_time_embedding(model, spec.time_embedding, self.extra))

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        cond = cond or {}
        self.extra.value = branches(self.arrival, self.guidance, t, s, cond)
        labels = self._labels(x.shape[0], x.device, cond)
        if self.takes_arrival:
            return self._checked(self.model(x, t, s, *labels), x)
        return velocity(self.spec, self.clock, lambda state, time: self._checked(self.model(state, time, *labels), x))(
            x, t
        )

    def _labels(self, rows: int, device: torch.device, cond: Cond) -> tuple[Tensor, ...]:
        if self.spec.classes is None:
            return ()
        null = 0 if self.spec.null_class is None else self.spec.null_class
        label = cond["class"] if "class" in cond else torch.full((rows,), -1, device=device)
        return (torch.where(label < 0, null, label),)

    def _checked(self, out: Any, x: Tensor) -> Tensor:
        if not isinstance(out, Tensor):
            raise ValueError(f"module: its output is a {type(out).__name__}, not a tensor of the shape of its input")
        if out.shape != x.shape:
            raise ValueError(f"module: its output has shape {(*out.shape,)}, its input {(*x.shape,)}")
        return out.to(x.dtype)

    def train(self, mode: bool = True) -> ModuleNet:
        """Keep the module in evaluation mode: a dropout mask would differ between a value and its derivative."""
        super().train(mode)
        self.model.eval()
        return self

    @torch.no_grad()
    def _probe(self, shape: tuple[int, ...], branch: bool) -> int:
        """Call the module once, and return the size of a row of its time embedding, 0 where no branch needs it.

        Raises ValueError where it fails, or its output has another shape.
        """
        weights = [*self.model.parameters(), *self.model.buffers()]
        meta = any(one.is_meta for one in weights)
        probed = copy.deepcopy(self.model).to("meta") if meta else self.model
        sizes: list[int] = []
        if branch:
            module, _, method = _time_embedding(probed, self.spec.time_embedding, self.extra)
            note = lambda out: sizes.append(out[0].numel())
            kept, original = module.__dict__.get(method), getattr(module, method)
            module.__dict__[method] = lambda *args, **kwargs: _noted(original(*args, **kwargs), note)
        device = torch.device("meta") if meta else weights[0].device if weights else torch.get_default_device()
        try:
            with device:
                self._probed(probed.eval(), shape)
        except ValueError:
            raise
        except Exception as error:  # of the user's own module
            raise ValueError(f"module: {self._failure(error, shape)}") from error
        finally:
            if branch:
                del module.__dict__[method]
                module.__dict__.update({} if kept is None else {method: kept})
        if branch and not sizes:
            raise ValueError(f"time_embedding: {self.spec.time_embedding!r} is not called by the module")
        return sizes[0] if sizes else 0

    def _probed(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        x, half, spec = torch.zeros(2, *shape), torch.full((2,), 0.5), self.spec
        _, time = self.clock.at(half)
        times = (half, half) if self.takes_arrival else (time.float(),)
        labels = () if spec.classes is None else (torch.tensor([spec.classes - 1, spec.null_class or 0]),)
        self._checked(model(x, *times, *labels), x)

    def _failure(self, error: Exception, shape: tuple[int, ...]) -> str:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "meta tensor" in first or "meta device" in first:
            what = "reads values of tensors in Python (if, float(), .item(), numpy), which costs and derivatives cannot"
            return f"{what} follow; take operations of torch, such as torch.where: {first}"
        called = f"net({', '.join(self._words())}) with x {(2, *shape)}"
        what = f"cannot be called as {called}: {type(error).__name__}: {first}"
        if isinstance(error, IndexError) and self.spec.classes is not None:
            what += f" (classes: {self.spec.classes} and null_class: {self.spec.null_class} may exceed its table)"
        return what

    def _words(self) -> list[str]:
        return ["x", "t", *(["s"] if self.takes_arrival else []), *(["label"] if self.spec.classes else [])]


def velocity(spec: ModuleSettings, clock: Any, predict: Any):
    """The function (x, t) -> x1 - x0 for x in [-1, 1], from predict(state, time) with the module's own settings.

    With the module's data p x0 + q, our point x at t is its (1 - u) q + ((1 - u) p + u) x at u = p t / (1 - t + p t).
    """
    p, q = (spec.range[1] - spec.range[0]) / 2, (spec.range[0] + spec.range[1]) / 2

    def ours(x: Tensor, t: Tensor) -> Tensor:
        t = _inside(spec, clock, wide(t))
        u = p * t / (1 - t + p * t)
        own = (broadcast_time((1 - u) * q, x) + broadcast_time((1 - u) * p + u, x) * x).to(x.dtype)
        if spec.prediction == "edm":
            raw = lambda state, noise: predict(state, noise.to(state.dtype))
            v = preconditioning.velocity_of(raw, own, u, spec.sigma_data)
        elif spec.prediction == "velocity":
            v = velocity_of(predict, clock, own, u, "linear_velocity") * (-1 if spec.clock.towards_data else 1)
        else:
            v = velocity_of(predict, clock, own, u, spec.prediction)
        if (p, q) == (1, 0):
            return v
        return (own * (1 - 1 / p) + q / p + broadcast_time(1 - u + u / p, x) * v).to(x.dtype)

    return ours


def _inside(spec: ModuleSettings, clock: Any, t: Tensor) -> Tensor:
    """The times with those moved at which the prediction does not determine a velocity."""
    if spec.prediction == "x0":
        return t.clamp(min=max(spec.first, clock.t_min))
    return t.clamp(max=LAST_EPSILON) if spec.prediction == "epsilon" and spec.clock.flows else t


def takes_arrival(model: nn.Module) -> bool:
    """Whether the module's forward has a parameter `s`, the arrival time."""
    return "s" in inspect.signature(model.forward).parameters


def _time_embedding(model: nn.Module, name: str | None, extra: Extra) -> tuple[nn.Module, Extra, str]:
    """(module, extra, method) for `listen`. ValueError where there is no such submodule or method."""
    names = [one for one, _ in model.named_modules() if one]
    if name is None:
        what = "takes no arrival time s, so its student needs the submodule whose output is the time embedding"
        raise ValueError(f"time_embedding: the module {what}; submodules: {', '.join(names[:12])}")
    if name in names:
        return model.get_submodule(name), extra, "forward"
    owner, _, method = name.rpartition(".")
    if owner in ("", *names) and callable(vars(type(model.get_submodule(owner))).get(method)):
        return model.get_submodule(owner), extra, method
    raise ValueError(f"time_embedding: the module has no submodule or method {name!r}; has: {', '.join(names[:12])}")


def _noted(out: Tensor, note: Any) -> Tensor:
    note(out)
    return out
