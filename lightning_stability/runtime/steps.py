"""One optimizer step while it is under way: its backward passes, and its record before the numbers have arrived."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stability.health import GradientMeter, StepRecord
from lightning_stability.health.gradients import Measurement
from lightning_stability.recovery.guard import Verdict

GRAD_SCALER = "GradScaler"
GUARD = "guard"
HALT = "halt"
NO_LOSS = "no loss"
REJECTED = "InputCheck"


@dataclass(slots=True)
class Window:
    """The backward passes since the last step."""

    loss: Tensor | None = None
    numbers: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    @property
    def batches(self) -> int:
        return len(self.numbers)

    def add(self, loss: Tensor, number: int, index: int) -> None:
        # Lightning has divided each loss by accumulate_grad_batches: their sum is the window's mean.
        self.loss = loss if self.loss is None else self.loss + loss
        if not self.numbers or number != self.numbers[-1]:
            self.numbers.append(number)
            self.indices.append(index)
            self.losses.append(loss)
        else:  # manual optimization may go backward twice in a batch
            self.losses[-1] = self.losses[-1] + loss

    def first_bad(self) -> Tensor:
        """Which of its batches was the first with a loss that is not finite; one past the last if none was."""
        bad = torch.isfinite(torch.stack(self.losses)).logical_not_()
        return torch.where(bad.any(), bad.to(torch.uint8).argmax(), self.batches)


@dataclass(slots=True)
class OpenStep:
    """An optimizer step that is under way."""

    optimizer: Optimizer
    meter: GradientMeter | None = None
    logger_step: int = 0
    batches: int = 0
    learning_rates: list[float | str] = field(default_factory=list)
    divide_by_scale: bool = False
    called: bool = False
    found_inf: Tensor | None = None
    verdict: Verdict | None = None
    scalar_names: tuple[str, ...] = ()

    def late_scalars(self) -> dict[str, Tensor]:
        """What is known on the device only after the optimizer's call."""
        scalars = {"found_inf": self.found_inf}
        if self.verdict is not None:
            scalars["held"] = self.verdict.held
            if self.verdict.skipped is None:  # decided on the device, or not asked because GradScaler skipped
                scalars["bad"] = self.verdict.bad
            scalars["rejected"] = self.verdict.rejected
            if self.verdict.buffer is not None:
                scalars["buffer_bad"], scalars["buffer_index"] = self.verdict.buffer
        return {name: scalar for name, scalar in scalars.items() if scalar is not None}

    def take_learning_rates(self) -> dict[str, Tensor]:
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


@dataclass(slots=True)
class RecordDraft:
    """What the host knows of a step before its numbers arrive."""

    step: int
    logger_step: int
    epoch: int
    optimizer: int
    batches: int
    batch_indices: tuple[int, ...]
    batch_numbers: tuple[int, ...]
    learning_rates: list[float | str]
    parameter_names: tuple[str, ...]
    largest_norm: float
    divide_by_scale: bool
    skipped_by: str | None
    skipped_by_guard: bool

    def complete(self, measured: Measurement) -> StepRecord:
        scalars = measured.scalars
        scale = scalars.get("loss_scale")
        norms = measured.grad_norms
        if self.divide_by_scale:
            # a scale that ran down to 0 leaves gradients of 0: nan says so, as the division would
            norms = norms / scale if scale else norms * float("nan")
        rates = tuple(scalars[r] if isinstance(r, str) else r for r in self.learning_rates)
        return StepRecord(
            step=self.step,
            logger_step=self.logger_step,
            epoch=self.epoch,
            optimizer=self.optimizer,
            batches=self.batches,
            parameter_names=self.parameter_names,
            largest_norm=self.largest_norm,
            grad_norms=norms,
            loss=scalars.get("loss"),
            loss_scale=scale,
            learning_rates=rates,
            clip_coefficient=scalars.get("clip_coefficient"),
            skipped_by=self._skipped_by(scalars),
            batch_idx=self._of_batch(self.batch_indices, scalars),
            batch_number=self._of_batch(self.batch_numbers, scalars),
            buffer_index=int(scalars["buffer_index"]) if scalars.get("buffer_bad") else None,
            weight_norms=measured.weight_norms,
            update_norms=measured.update_norms,
        )

    def _skipped_by(self, scalars: dict[str, float]) -> str | None:
        if scalars.get("held"):
            return HALT
        if scalars.get("rejected"):
            return REJECTED
        if self.skipped_by is not None or scalars.get("found_inf"):
            return self.skipped_by or GRAD_SCALER
        return GUARD if self.skipped_by_guard or scalars.get("bad") else None

    def _of_batch(self, values: tuple[int, ...], scalars: dict[str, float]) -> int:
        if not values:
            return -1
        return values[min(int(scalars.get("bad_batch", len(values))), len(values) - 1)]
