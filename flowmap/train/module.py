"""The LightningModule: a student that trains beside a frozen teacher, and the averages of the student's weights."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flowmap.build.parts import BuiltTeacher, build_decoder
from flowmap.data import Dataset, PairedDataset, StepBatches, as_it_is, first_place
from flowmap.flow.averaging import exponent_from_std, power_beta
from flowmap.flow.draws import RowGenerator
from flowmap.flow.prior import LearnedPrior
from flowmap.flow.types import Loss, PathSample
from flowmap.nets.uncertainty import with_uncertainty
from flowmap.recipe import Recipe
from flowmap.recipe.settings import PowerEMA
from flowmap.train.draw import draw_sample, drawing_by, generator_for

BINS = 4  # of t, in which per-sample logs are also shown


class NotFinite(RuntimeError):
    """The loss or a weight became NaN or infinite: the run stops here."""


def as_trained(student: nn.Module, recipe: Recipe) -> nn.Module:
    """The student with what only training needs: the branch of a learned weight, where the objective has one."""
    return with_uncertainty(student, recipe.seed) if recipe.distillation.learns_weight else student


class DistillModule(L.LightningModule):
    """Draws a sample, asks the objective, averages the weights.

    `student` and `averages` are all that is in state_dict(); the teacher is held without being a submodule. `averages` holds one copy of the
    student per width of a power-function EMA (its first is the one that ships), or a single one for a constant decay. What is frozen in the
    student is shared by all, and in no state_dict (nets/lora.py).
    """

    def __init__(
        self,
        recipe: Recipe,
        student: nn.Module,
        teacher: BuiltTeacher | None,
        data: Dataset,
        samples: Dataset | PairedDataset | None = None,
        prior: LearnedPrior | None = None,
    ):
        """samples: what batches are read from, where that is not the data itself but pairs made of it. prior: the recipe's, if it is learned;
        held like the teacher."""
        super().__init__()
        self.recipe, self.teacher, self.data, self.prior = recipe, teacher, data, prior
        self.samples = data if samples is None else samples
        self.student = as_trained(student, recipe).train()
        self.widths = _widths(recipe)
        self.averages = nn.ModuleList(_copy(student).eval().requires_grad_(False) for _ in self.widths)
        self.last_sample: PathSample | None = None
        self.last_loss: Loss | None = None
        self._decoder = build_decoder(recipe)  # no module either, as the teacher
        self._micro, self.begun, self._restored = 0, False, None

    @property
    def averaged(self) -> nn.Module:
        """The average that ships."""
        return self.averages[0]

    def configure_model(self) -> None:
        for net in (self.student, *self.averages):
            if hasattr(net.net, "activation_checkpointing"):
                net.net.activation_checkpointing = self.recipe.trainer.activation_checkpointing and net is self.student
        if self.recipe.trainer.strategy == "fsdp" and not getattr(self, "_sharded", False):
            from flowmap.train.strategy import shard

            for net in (self.student, *self.averages):
                shard(net, self.device_mesh)
            self._sharded = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.recipe.optimizer(trained(self.student))

    def train_dataloader(self) -> DataLoader:
        """From the step that the run is at: a resumed run sees the batches that it would have seen."""
        batches = StepBatches(len(self.samples), **self._split, seed=self.recipe.seed, start_step=self.global_step)
        return DataLoader(self.samples, batch_sampler=batches, collate_fn=as_it_is)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._restored = len(checkpoint["optimizer_states"])

    def on_train_start(self) -> None:
        if self._restored not in (None, len(self.trainer.optimizers)):  # Lightning would go on with a fresh one
            raise ValueError(
                f"optimizer_states: there are {self._restored}, this run has {len(self.trainer.optimizers)}"
            )
        self._micro, self.begun = 0, True
        if self.teacher is not None:
            self.teacher.to(self.device)
        if self.prior is not None:
            self.prior.to(self.device)
        if self._decoder is not None:
            self.student.decode = self._decoder.to(self.device).decode_with_grad

    @property
    def _split(self) -> dict[str, int]:
        """How a step's samples are dealt out."""
        recipe = self.recipe
        ours = {"rank": self.global_rank, "world": self.trainer.world_size}
        return {"batch_size": recipe.data.batch_size, "accumulate": recipe.trainer.accumulate, **ours}

    def training_step(self, batch, batch_idx: int) -> Tensor | None:
        """All that `learn` draws by torch's own generator, dropout's masks, is a function of (seed, step, micro-batch, process)."""
        with drawing_by(f"{self.recipe.seed}/{self.global_step}/{self._micro}/{self.global_rank}", self.device):
            return self.learn(*self.draw(batch))

    def learn(self, sample: PathSample, generator: RowGenerator) -> Tensor | None:
        """The micro-batch's loss, or None where the optimisers are stepped here."""
        loss = self.recipe.objective(self.student, self.teacher and self.teacher.guided, sample, self.global_step)
        self.keep(sample, loss)
        return loss.value

    def draw(self, batch) -> tuple[PathSample, RowGenerator]:
        """The micro-batch's sample and the generator that drew it; the student's learning rate is that of the step."""
        x0, cond, *paired = batch
        step, micro = self.global_step, self._micro
        self._micro = (micro + 1) % self.recipe.trainer.accumulate
        self.trainer.optimizers[0].param_groups[0]["lr"] = self.recipe.optimizer.lr_at(step, self.recipe.trainer.steps)
        generator = generator_for(self.recipe.seed, step, first_place(step, micro, **self._split), len(x0), x0.device)
        if not paired and hasattr(self.data, "partners"):
            paired = [self.data.partners(x0, generator)]
        return draw_sample(self.recipe, x0, cond, generator, self.data.empty, *paired, prior=self.prior), generator

    def keep(self, sample: PathSample, loss: Loss) -> None:
        """The last sample and loss, for the logs; NotFinite unless it is finite."""
        self.last_sample, self.last_loss = sample, loss
        self._must_be_finite("loss", loss.value.detach())

    def on_before_optimizer_step(self, optimizer) -> None:
        self._must_be_finite(
            "gradient's norm", norm_of([p.grad for p in self.student.parameters() if p.grad is not None])
        )

    def _must_be_finite(self, what: str, value: Tensor) -> None:
        """Raises NotFinite on every process if the value is NaN or infinite on any: none is left waiting for the others."""
        bad = (~torch.isfinite(value)).float()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        if bool(bad):
            t, s = self.last_sample.t, self.last_sample.s
            times = ", ".join(
                f"{name} in [{float(v.min()):.4g}, {float(v.max()):.4g}]" for name, v in (("t", t), ("s", s))
            )
            raise NotFinite(f"the {what} is {value.item()} at step {self.global_step} ({times})")

    @torch.no_grad()
    def average(self) -> None:
        """Takes the weights of the step that has just been made into every average."""
        for width, average in zip(self.widths, self.averages, strict=True):
            pairs = [
                (a, w) for a, w in zip(average.parameters(), self.student.parameters(), strict=True) if w.requires_grad
            ]
            torch._foreach_lerp_([a for a, _ in pairs], [w for _, w in pairs], 1 - self._kept(width))

    def _kept(self, width: float) -> float:
        if isinstance(self.recipe.ema, PowerEMA):
            return power_beta(self.global_step, exponent_from_std(width))
        return min(width, self.global_step / (self.global_step + 9))  # a short run is not held back by its start

    def loss_logs(self) -> dict[str, float]:
        """The last loss and its logs, per-sample ones also by bins of t."""
        loss, t = self.last_loss, self.last_sample.t
        logs = {"train/loss": float(loss.value.detach())}
        for key, value in loss.logs.items():
            logs[f"train/{key}"] = float(value.mean())
            if value.ndim == 1 and len(value) == len(t):
                for i in range(BINS):
                    inside = (t >= i / BINS) & (t < (i + 1) / BINS + (i == BINS - 1))
                    if bool(inside.any()):
                        logs[f"by_time/{key}_t{i / BINS:.2f}-{(i + 1) / BINS:.2f}"] = float(value[inside].mean())
        return logs


def trained(net: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes: all, or beside a frozen base those of adapters and branches."""
    return [p for p in net.parameters() if p.requires_grad]


def _copy(student: nn.Module) -> nn.Module:
    """A copy that shares what is frozen."""
    return copy.deepcopy(student, {id(p): p for p in student.parameters() if not p.requires_grad})


def norm_of(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of all of them together, a scalar on their device; the whole tensors' where they are sharded."""
    if not tensors:
        return torch.zeros(())
    norm = torch.nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _widths(recipe: Recipe) -> tuple[float, ...]:
    if isinstance(recipe.ema, PowerEMA):
        extra = recipe.ema.snapshot_stds if recipe.ema.snapshot_every_steps else ()
        return tuple(dict.fromkeys((recipe.ema.std, *extra)))
    return (recipe.ema.decay,)
