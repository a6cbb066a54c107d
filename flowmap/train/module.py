"""The LightningModule: a student that trains against a frozen teacher, and the averages of the student's weights."""

from __future__ import annotations

import copy
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flowmap.base.schema import RecipeError
from flowmap.build.data import build_decoder
from flowmap.build.teacher import BuiltTeacher
from flowmap.data import Dataset, PairedDataset, StepBatches, first_place
from flowmap.data.dataset import full_precision
from flowmap.flow.draws import RowGenerator
from flowmap.flow.prior import LearnedPrior
from flowmap.flow.types import Cond, Loss, PathSample, Teacher
from flowmap.nets.adapters import AdapterAverage, share_base, shares_base
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.uncertainty import with_uncertainty
from flowmap.plan.plan import ResolvedRun
from flowmap.recipe import Recipe
from flowmap.train.device import channels_last
from flowmap.train.draw import draw_sample, drawing_by, generator_for
from flowmap.train.finite import FiniteChecks, NotFinite
from flowmap.train.loading import Loader, loader_of

BINS = 4  # of t, by which per-sample logs are also shown


def as_trained(student: FlowMapNet, recipe: Recipe) -> FlowMapNet:
    """The student with what only training needs: the branch of a learned weight, where the objective has one."""
    return with_uncertainty(student, recipe.seed) if recipe.distillation.learns_weight else student


class DistillModule(L.LightningModule):
    """Draws a sample, computes the objective, averages the weights.

    `student` and `averages` are all that is in state_dict(); the teacher is not a submodule. `averages` has one copy of
    the student per width of a power-function EMA (the first ships), or a single one for a constant decay. Frozen
    parameters are shared by all of them and are in no state_dict (nets/lora.py).
    """

    def __init__(
        self,
        run: ResolvedRun,
        student: FlowMapNet,
        teacher: BuiltTeacher | None,
        data: Dataset,
        samples: Dataset | PairedDataset | None = None,
        prior: LearnedPrior | None = None,
    ):
        """samples: what batches are read from, if that is not the data itself but pairs made of it.

        prior: the recipe's learned prior, if it has one; not a submodule either.
        """
        super().__init__()
        recipe = run.recipe
        self.recipe, self.teacher, self.data, self.prior = recipe, teacher, data, prior
        self.samples = data if samples is None else samples
        self.student = as_trained(student, recipe).train()
        self.widths = recipe.ema.widths
        average = _copy
        if recipe.trainer.strategy == "fsdp":
            average = AdapterAverage if recipe.lora else _view
        self.averages = nn.ModuleList(average(student).eval().requires_grad_(False) for _ in self.widths)
        self.last_sample: PathSample | None = None
        self.last_loss: Loss | None = None
        self._decoder = build_decoder(run)  # no submodule, as the teacher
        self._micro, self.begun, self._sharded = 0, False, False
        self._restored: int | None = None
        self._null: dict[str, Tensor] = {}
        self._pairs: list[tuple[list[Tensor], list[Tensor]]] = []
        self._finite = FiniteChecks(recipe.trainer.check_finite_every_steps)

    @property
    def averaged(self) -> FlowMapNet:
        """The average that ships."""
        return cast(FlowMapNet, self.averages[0])

    @property
    def guided(self) -> Teacher | None:
        """The teacher's velocity as the objective sees it, with guidance."""
        return None if self.teacher is None else self.teacher.in_training(self.recipe.teacher)

    @property
    def networks(self) -> list[FlowMapNet]:
        """The networks that are trained on samples and that `trainer.compile` compiles."""
        return [self.student]

    @property
    def last(self) -> tuple[PathSample, Loss]:
        """The sample and the loss of the last micro-batch."""
        assert self.last_sample is not None and self.last_loss is not None, "no step has been made"
        return self.last_sample, self.last_loss

    def configure_model(self) -> None:
        copies = [self.student, *(cast(FlowMapNet, net) for net in self.averages)]
        self._to_channels_last(*copies)
        for net in copies:
            net.checkpoint_activations(self.recipe.trainer.activation_checkpointing and net is self.student)
        if self.recipe.trainer.strategy == "fsdp" and not self._sharded:
            from flowmap.train.sharding import mesh_of, shard, shard_frozen

            mesh = mesh_of(self.recipe.trainer, self.trainer.strategy.root_device.type)
            frozen = [] if self.teacher is None else [cast(FlowMapNet, net) for net in self.teacher.modules]
            alike = [net for net in frozen if shares_base(net, self.student)]
            dtype = torch.bfloat16 if self.recipe.trainer.precision == "bf16" else None
            for net in copies:
                net.follow() if isinstance(net, AdapterAverage) else shard(net, mesh, dtype=dtype)
            for net in alike:  # a LoRA student's base is sharded once
                share_base(net, self.student)
            if others := [net for net in frozen if net not in alike]:
                shard_frozen(others, mesh)
            self._sharded = True

    def _to_channels_last(self, *nets: nn.Module) -> None:
        """Convert networks of convolutions as trainer.channels_last says; not under FSDP2, which refuses it."""
        trainer = self.recipe.trainer
        for net in nets if trainer.strategy != "fsdp" else ():
            channels_last(net, trainer.channels_last, self.trainer.strategy.root_device)

    def configure_optimizers(self) -> torch.optim.Optimizer | list[torch.optim.Optimizer]:
        return self.recipe.optimizer(trained(self.student))

    def train_dataloader(self) -> Loader:
        """From the run's step on: a resumed run sees the batches that it would have seen."""
        order = {"seed": self.recipe.seed, "start_step": self.global_step}
        batches = StepBatches(len(self.samples), shuffle=self.recipe.data.shuffle, **order, **self._split)
        return loader_of(self.recipe, self.samples, batches, self.trainer.strategy.root_device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._restored = len(checkpoint["optimizer_states"])
        if self.automatic_optimization:
            _count_batches(checkpoint, self.recipe.batches.accumulate)

    def on_train_start(self) -> None:
        if self._restored not in (None, len(self.trainer.optimizers)):  # Lightning would go on with a fresh one
            raise ValueError(
                f"optimizer_states: there are {self._restored}, this run has {len(self.trainer.optimizers)}"
            )
        self._check_processes()
        self._micro, self.begun, self._pairs = 0, True, []
        self.data.to_device(self.device)
        if self.teacher is not None:
            self.teacher.to(self.device)
            self._to_channels_last(*self.teacher.modules)
        if self.prior is not None:
            self.prior.to(self.device)
        if self._decoder is not None:
            self.student.decode = self._decoder.to(self.device).decode_with_grad

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Text that is stored as captions is encoded here, on the device."""
        x0, cond, *paired = batch
        return (x0, self.data.complete(cond), *paired)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Workers send latents and text in the half precision in which they are stored."""
        x0, cond, *paired = batch
        return (full_precision(x0), {name: full_precision(value) for name, value in cond.items()}, *paired)

    def _check_processes(self) -> None:
        """Raise RecipeError if a global batch was split for another number of processes than there are."""
        batches, world = self.recipe.batches, self.trainer.world_size
        if self.recipe.data.global_batch_size is not None and batches.processes != world:
            settings = f"trainer.devices: {batches.devices} x trainer.num_nodes: {batches.nodes}"
            raise RecipeError(f"{self.recipe.name}: {settings} does not agree with the {world} processes that run")

    @property
    def _split(self) -> dict[str, int]:
        """How the samples of a step are split over micro-batches and processes."""
        recipe = self.recipe
        ours = {"rank": self.global_rank, "world": self.trainer.world_size}
        return {"batch_size": recipe.data.batch_size, "accumulate": recipe.batches.accumulate, **ours}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """What `learn` draws from torch's own generator is a function of (seed, step, micro-batch, process)."""
        if self.recipe.trainer.compile == "cuda_graphs":
            torch.compiler.cudagraph_mark_step_begin()  # what the graphs of the last step returned may be overwritten
        with drawing_by(f"{self.recipe.seed}/{self.global_step}/{self._micro}/{self.global_rank}", self.device):
            return self.learn(*self.draw(batch))

    def learn(self, sample: PathSample, generator: RowGenerator) -> Tensor | None:
        """The micro-batch's loss, or None if the optimizers are stepped here."""
        loss = self.recipe.objective(self.student, self.guided, sample, self.global_step)
        self.keep(sample, loss)
        return loss.value

    def draw(self, batch: Any) -> tuple[PathSample, RowGenerator]:
        """The micro-batch's sample and the generator that drew it; sets the student's learning rate of the step."""
        x0, cond, *paired = batch
        step, micro = self.global_step, self._micro
        self._micro = (micro + 1) % self.recipe.batches.accumulate
        self.trainer.optimizers[0].param_groups[0]["lr"] = self.recipe.optimizer.lr_at(step, self.recipe.trainer.steps)
        generator = generator_for(self.recipe.seed, step, first_place(step, micro, **self._split), len(x0), x0.device)
        x1 = paired[0] if paired else self.data.partners(x0, generator)
        return draw_sample(self.recipe, x0, cond, generator, self._empty(x0.device), x1, self.prior), generator

    def _empty(self, device: torch.device) -> Cond:
        """The conditions of an empty text on that device, where they stay."""
        if any(row.device != device for row in self._null.values()) or not self._null:
            self._null = {key: row.to(device) for key, row in self.data.empty.items()}
        return self._null

    def keep(self, sample: PathSample, loss: Loss) -> None:
        """Keep the last sample and loss for the logs; raises NotFinite unless the loss is finite."""
        self.last_sample, self.last_loss = sample, loss
        self._must_be_finite("loss", loss.value.detach())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        self._must_be_finite("gradient's norm", norm_of(gradients))

    def _must_be_finite(self, what: str, value: Tensor) -> None:
        """Raise NotFinite on every process if the value is NaN or infinite on any, so that none waits.

        With trainer.check_finite_every_steps above 1 it is noted on the device, and `check_finite` raises.
        """
        if self._finite.every > 1:
            self._finite.note(what, value, self.global_step)
            return
        bad = (~torch.isfinite(value)).float()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        if bool(bad):
            assert self.last_sample is not None, "it is kept before anything is checked"
            t, s = self.last_sample.t, self.last_sample.s
            times = ", ".join(
                f"{name} in [{float(v.min()):.4g}, {float(v.max()):.4g}]" for name, v in (("t", t), ("s", s))
            )
            raise NotFinite(f"the {what} is {value.item()} at step {self.global_step} ({times})")

    def check_finite(self, done: int | None = None) -> None:
        """Raise NotFinite if a value was not finite on any process since the last call; all processes call it.

        done: the number of finished steps, after which it is only due every so often; None: now. The host waits for the
        device.
        """
        if self._finite.due(done) and (bad := self._finite.found(self.trainer.world_size)) is not None:
            raise NotFinite(f"the {bad[0]} is NaN or infinite at step {bad[1]}")

    @torch.no_grad()
    def average(self) -> None:
        """Add the weights of the step that has just been made to every average."""
        for width, (mine, theirs) in zip(self.widths, self._averaged_pairs(), strict=True):
            torch._foreach_lerp_(mine, theirs, 1 - self.recipe.ema.kept(width, self.global_step))

    def _averaged_pairs(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """The weights of each average with those of the student; found once, as a large network has many modules."""
        if not self._pairs:
            theirs = {name: weight for name, weight in self.student.named_parameters() if weight.requires_grad}
            for average in self.averages:
                mine = dict(average.named_parameters())  # a LoRA student's may have what is trained alone
                self._pairs.append(([mine[name] for name in theirs], list(theirs.values())))
        return self._pairs

    def loss_logs(self) -> dict[str, float]:
        """The last loss and its logs, per-sample ones also by bins of t."""
        sample, loss = self.last
        t, logs = sample.t, {"train/loss": float(loss.value.detach())}
        for key, value in loss.logs.items():
            logs[f"train/{key}"] = float(value.mean())
            if value.ndim == 1 and len(value) == len(t):
                logs |= _by_time(key, value, t)
        return logs


def _count_batches(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Make the counters of micro-batches in a checkpoint those of a run with `accumulate` of them a step.

    Lightning steps the optimizer when that number divides its counter, and the run may have had another one before.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    shift = checkpoint["global_step"] * accumulate - progress["current"]["ready"]
    for counters in (progress["total"], progress["current"]):
        counters.update({key: count + shift for key, count in counters.items()})


def trained(net: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes: all, or those of adapters and branches on a frozen base."""
    return [p for p in net.parameters() if p.requires_grad]


def _by_time(key: str, value: Tensor, t: Tensor) -> dict[str, float]:
    """The means of a per-sample log in bins of t, without the empty bins."""
    logs = {}
    for i in range(BINS):
        inside = (t >= i / BINS) & (t < (i + 1) / BINS + (i == BINS - 1))
        if bool(inside.any()):
            logs[f"by_time/{key}_t{i / BINS:.2f}-{(i + 1) / BINS:.2f}"] = float(value[inside].mean())
    return logs


def _copy(student: FlowMapNet) -> FlowMapNet:
    """A copy that shares the frozen parameters."""
    return copy.deepcopy(student, {id(p): p for p in student.parameters() if not p.requires_grad})


def _view(student: FlowMapNet) -> FlowMapNet:
    """A copy with parameters of its own in the student's memory, and the student's buffers; sharding copies them."""
    own = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in student.parameters()}
    return copy.deepcopy(student, own | {id(buffer): buffer for buffer in student.buffers()})


def norm_of(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of all tensors together, a scalar on their device; sharded tensors count whole."""
    if not tensors:
        return torch.zeros(())
    norm = torch.nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
