"""One optimizer step: open while it runs, a record once its numbers are on the host, and what became of it."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stability.health import GradientMeter, Measurement, StepRecord
from lightning_stability.recovery import Verdict

GRAD_SCALER = "GradScaler"
GUARD = "guard"
HELD = "held"
LEFT_OUT = "module"
NO_LOSS = "no loss"
REJECTED = "rejected"
SPIKE = "spike"


class Outcome(str, enum.Enum):
    """What became of a step's update: `record.outcome`, which is text.

    Example:
        >>> Outcome.APPLIED == "applied", [outcome.value for outcome in Outcome]
        (True, ['applied', 'ordinary_skip', 'bad', 'rejected', 'held', 'no_loss', 'spike'])
    """

    APPLIED = "applied"
    ORDINARY_SKIP = "ordinary_skip"
    BAD = "bad"
    REJECTED = "rejected"
    HELD = "held"
    NO_LOSS = "no_loss"
    SPIKE = "spike"

    __hash__ = str.__hash__


_NEITHER = {
    NO_LOSS: Outcome.NO_LOSS,
    REJECTED: Outcome.REJECTED,
    HELD: Outcome.HELD,
    SPIKE: Outcome.SPIKE,
}
"""What is neither bad nor good."""


@dataclass(frozen=True)
class SpikeLimits:
    """Above either of them an optimizer's step is skipped; 0-dimensional, on the device, `inf` for no limit."""

    norm: Tensor
    loss: Tensor | None = None

    def exceeded(self, norm: Tensor, scale: Tensor | None, loss: Tensor | None) -> Tensor:
        """1.0 if a step is above one of them. What is NaN is not: that is bad, and no spike.

        Args:
            scale: What they are still multiplied with.
        """
        limit = self.norm if scale is None else self.norm * scale.to(self.norm.device)
        above = norm > limit.to(norm.device)
        if self.loss is not None and loss is not None:
            above = above | (loss > self.loss.to(loss.device)).to(norm.device)
        return above.float()


@dataclass(frozen=True)
class Limits:
    """What separates a skip that GradScaler answers by halving its scale from a bad step."""

    min_loss_scale: float = 1.0
    max_consecutive_skips: int = 20


def classify(record: StepRecord, skips_before: int, limits: Limits) -> Outcome:
    """What became of a step.

    Args:
        skips_before: Ordinary skips of its optimizer in a row right before it.
        limits: Beyond them a skip is not ordinary.
    """
    by = record.skipped_by
    if by is None:
        return Outcome.APPLIED
    if by in _NEITHER:
        return _NEITHER[by]
    if by in (GUARD, LEFT_OUT) or record.bad_loss_ranks or not record.loss_finite or record.nonfinite_buffer:
        return Outcome.BAD
    collapsed = record.loss_scale is not None and record.loss_scale < limits.min_loss_scale
    return Outcome.BAD if collapsed or skips_before >= limits.max_consecutive_skips else Outcome.ORDINARY_SKIP


@dataclass(slots=True)
class Losses:
    """The backward passes since the last step."""

    total: Tensor | None = None
    numbers: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    of_batches: list[Tensor] = field(default_factory=list)
    exception: str | None = None
    """What raised what on one of the batches, which was skipped for it."""

    @property
    def batches(self) -> int:
        return len(self.numbers)

    def add(self, loss: Tensor, number: int, index: int) -> None:
        # Lightning has divided each loss by accumulate_grad_batches: their sum is the window's mean.
        self.total = loss if self.total is None else self.total + loss
        if not self.numbers or number != self.numbers[-1]:
            self.numbers.append(number)
            self.indices.append(index)
            self.of_batches.append(loss)
        else:  # manual optimization may run backward twice in a batch
            self.of_batches[-1] = self.of_batches[-1] + loss

    def note_exception(self, what: str, error: Exception) -> None:
        """What has raised it, for the record."""
        self.exception = f"{what} raised {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"

    def first_nonfinite(self) -> Tensor:
        """Which of the batches was the first with a non-finite loss; one past the last if none was."""
        bad = torch.isfinite(torch.stack(self.of_batches)).logical_not_()
        return torch.where(bad.any(), bad.to(torch.uint8).argmax(), self.batches)


@dataclass(slots=True, eq=False)
class Step:
    """An optimizer step under way, and what the host knows of it before its numbers arrive."""

    optimizer: Optimizer
    index: int = 0
    """The optimizer's place in `trainer.optimizers`."""
    meter: GradientMeter | None = None
    losses: Losses = field(default_factory=Losses)
    step: int = 0
    logger_step: int = 0
    epoch: int = 0
    learning_rates: list[float | str] = field(default_factory=list)
    scaled: bool = False
    """Whether a GradScaler is at work."""
    divide_by_scale: bool = False
    called: bool = False
    found_inf: Tensor | None = None
    verdict: Verdict | None = None
    bad_option: str | None = None
    """A non-finite option of the optimizer, such as `lr=nan`."""
    left_out: bool = False
    """Whether it was never made: the module has left it out by itself."""

    def learning_rates_on_device(self) -> dict[str, Tensor]:
        """Note each group's learning rate; return those that are on the device, by name."""
        self.learning_rates, on_device = [], {}
        for index, group in enumerate(self.optimizer.param_groups):
            rate = group.get("lr", 0.0)
            if isinstance(rate, Tensor) and rate.device.type != "cpu":
                name = f"learning_rate_{index}"
                on_device[name] = rate
                self.learning_rates.append(name)
            else:
                self.learning_rates.append(float(rate))
        return on_device

    def late_scalars(self) -> dict[str, Tensor]:
        """What is known on the device only after the optimizer's call."""
        scalars = {"found_inf": self.found_inf}
        if self.verdict is not None:
            scalars["held"] = self.verdict.held
            if self.verdict.skipped is None or self.verdict.spike is not None:
                # decided on the device, or not asked because GradScaler skipped, or for one of two reasons
                scalars["bad"] = self.verdict.bad
            scalars["rejected"] = self.verdict.rejected
            scalars["spike"] = self.verdict.spike
            if self.verdict.buffer is not None:
                scalars["buffer_bad"], scalars["buffer_index"] = self.verdict.buffer
        return {name: scalar for name, scalar in scalars.items() if scalar is not None}

    def record(self, measured: Measurement) -> StepRecord:
        """The record, now that the numbers are here."""
        assert self.meter is not None
        scalars, norms = measured.scalars, measured.grad_norms
        scale = scalars.get("loss_scale")
        if self.divide_by_scale:
            # a scale that ran down to 0 leaves gradients of 0: nan says so, as the division would
            norms = norms / scale if scale else norms * math.nan
        return StepRecord(
            step=self.step,
            logger_step=self.logger_step,
            epoch=self.epoch,
            optimizer=self.index,
            batches=self.losses.batches,
            parameter_names=self.meter.parameter_names,
            largest_norm=self.meter.largest_norm,
            grad_norms=norms,
            loss=scalars.get("loss"),
            loss_scale=scale,
            learning_rates=tuple(scalars[r] if isinstance(r, str) else r for r in self.learning_rates),
            clip_coefficient=scalars.get("clip_coefficient"),
            skipped_by=self._skipped_by(scalars),
            batch_idx=_of_batch(self.losses.indices, scalars),
            batch_number=_of_batch(self.losses.numbers, scalars),
            buffer_index=int(scalars["buffer_index"]) if scalars.get("buffer_bad") else None,
            weight_norms=measured.weight_norms,
            update_norms=measured.update_norms,
            bad_option=self.bad_option,
            exception=self.losses.exception,
            batch_losses=tuple(self.losses.of_batches),
        )

    def _skipped_by(self, scalars: Mapping[str, float]) -> str | None:
        if self.left_out:
            return LEFT_OUT
        if scalars.get("held"):
            return HELD
        if scalars.get("rejected"):
            return REJECTED
        if not self.called:
            return NO_LOSS if self.losses.batches == 0 else GRAD_SCALER
        if scalars.get("found_inf"):
            return GRAD_SCALER
        if scalars.get("spike") and not scalars.get("bad"):
            return SPIKE
        by_guard = self.verdict is not None and bool(self.verdict.skipped)
        return GUARD if by_guard or scalars.get("bad") else None


def _of_batch(values: list[int], scalars: Mapping[str, float]) -> int:
    if not values:
        return -1
    return values[min(int(scalars.get("bad_batch", len(values))), len(values) - 1)]
