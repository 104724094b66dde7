"""What became non-finite in a bad step, in a word and in a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stability.health.record import StepRecord
from lightning_stability.health.values import named_tensors, nonfinite_names, nonfinite_rows
from lightning_stability.internals import batch_index
from lightning_stability.runtime.policies import DeliberateError
from lightning_stability.runtime.record import LEFT_OUT

SHOWN_NAMES = 3


class NonFiniteError(DeliberateError, RuntimeError):
    """Raised by `NaNEarlyStop(action="raise")`; the process then ends with a non-zero status.

    Attributes:
        what: What became non-finite: `"loss"`, `"input"`, `"gradient"`, `"weight"`, `"buffer"`, `"loss_scale"`,
            `"optimizer"` or `"metric"`.
        step: Optimizer steps completed before the bad one (`trainer.global_step`).
        epoch: The epoch.
        batch_idx: The batch in that epoch; -1 for a metric.

    Example:
        >>> error = NonFiniteError("the loss was nan", what="loss", step=12, epoch=0, batch_idx=12)
        >>> str(error), error.what, error.step
        ('the loss was nan', 'loss', 12)
    """

    def __init__(self, message: str, what: str = "", step: int = -1, epoch: int = -1, batch_idx: int = -1) -> None:
        super().__init__(message, what, step, epoch, batch_idx)  # all of them, so that it can be pickled
        self.what, self.step, self.epoch, self.batch_idx = what, step, epoch, batch_idx

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(slots=True)
class Incident:
    """A bad step, or metric."""

    what: str
    """`"loss"`, `"input"`, `"gradient"`, `"weight"`, `"buffer"`, `"loss_scale"`, `"optimizer"` or `"metric"`."""
    why: str
    """A sentence, without a full stop."""
    step: int
    epoch: int
    batch_idx: int
    """-1 for a metric."""
    rank: int | None
    """The first rank whose loss was bad; None for a single one."""

    @classmethod
    def of(cls, record: StepRecord, batch: Any, several_ranks: bool) -> Incident:
        """Say of a skipped step what was wrong with it."""
        what, why = _explain(record, batch)
        if record.restored:
            why += f"; restored from a copy: {listed(record.restored)}"
        rank = record.bad_loss_ranks[0] if several_ranks and record.bad_loss_ranks else None
        return cls(what, why, record.step, record.epoch, record.batch_idx, rank)

    @property
    def place(self) -> str:
        """Where it was, in words."""
        batch = f", batch {self.batch_idx}" if self.batch_idx >= 0 else ""
        rank = f", rank {self.rank}" if self.rank is not None else ""
        return f"epoch {self.epoch}{batch}, global step {self.step}{rank}"


def loss_incident(trainer: Any, outputs: Any) -> Incident | None:
    """A loss that was not finite on some rank, where nothing else can be looked at; its update has been made.

    All ranks have to ask. `outputs` is what `on_train_batch_end` gets.
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    bad = isinstance(loss, Tensor) and not bool(torch.isfinite(loss).all())
    if not trainer.strategy.reduce_boolean_decision(bad, all=False):
        return None
    what = "the loss was not finite" if bad else "the loss was not finite on another rank"
    engine = type(trainer.strategy).__name__
    why = f"{what}; its update has been made, since under {engine} the engine alone can skip updates"
    return Incident("loss", why, trainer.global_step, trainer.current_epoch, batch_index(trainer), None)


def metric_incident(trainer: Any, names: Sequence[str]) -> Incident | None:
    """The first of the logged metrics of these names that is not finite."""
    metrics = trainer.callback_metrics
    values = ((name, float(metrics[name])) for name in names if name in metrics)
    bad = next(((name, value) for name, value in values if not math.isfinite(value)), None)
    if bad is None:
        return None
    why = f"the metric `{bad[0]}` was {bad[1]:g}"
    return Incident("metric", why, trainer.global_step, trainer.current_epoch, -1, None)


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are.

    Example:
        >>> listed(["a", "b"]), listed(["a", "b", "c", "d", "e"])
        ('`a`, `b`', '`a`, `b`, `c` and 2 more')
    """
    shown = ", ".join(f"`{name}`" for name in names[:SHOWN_NAMES])
    return shown if len(names) <= SHOWN_NAMES else f"{shown} and {len(names) - SHOWN_NAMES} more"


def _explain(record: StepRecord, batch: Any) -> tuple[str, str]:
    if record.outcome == "ordinary_skip":
        return "gradient", "GradScaler halves its scale"
    if record.outcome == "rejected":
        return "input", "a batch of its window was flagged"
    if record.bad_option is not None:
        return "optimizer", f"the optimizer has `{record.bad_option}`: its update would make weights non-finite"
    if record.exception is not None:
        where = where_nonfinite(batch)
        holds = f"; non-finite values are in {where}" if where else ""
        return "input", f"{record.exception}{holds}"
    if record.bad_loss_ranks or not record.loss_finite:
        where = where_nonfinite(batch)
        value = "not finite" if record.loss is None or record.loss_finite else f"{record.loss:g}"
        if where:
            return "input", f"the loss was {value}, and the input held non-finite values: {where}"
        return "loss", f"the loss was {value}"
    if record.nonfinite_buffer is not None:
        return "buffer", f"the forward pass made the buffer `{record.nonfinite_buffer}` non-finite (restored)"
    if record.skipped_by == "GradScaler":
        scale = f"{record.loss_scale:g}" if record.loss_scale is not None else "unknown"
        return "loss_scale", f"gradients overflow at every loss scale; it has fallen to {scale}"
    if record.loss is None and record.gradients_finite:
        left_out = "returned no loss" if record.skipped_by != LEFT_OUT else "made no update"
        return "loss", f"what `training_step` logged was not finite, and it {left_out}"
    where = f"the gradient of `{record.culprit}`" if record.culprit else "a gradient"
    if record.gradients == "overflow":
        return "gradient", f"the gradients were finite but their squares overflow fp32; the largest is {where}"
    verdict = "not finite" if record.gradients_finite else record.gradients
    of_loss = "" if record.loss is None else " while the loss was finite"
    of_input = where_nonfinite(batch)
    held = f", and the input held non-finite values: {of_input}" if of_input else ""
    return "gradient", f"{where} was {verdict}{of_loss}{held}"


def where_nonfinite(batch: Any) -> str:
    """Which tensors of a batch hold NaN or infinity, the first one's samples and columns too; empty if none does.

    Example:
        >>> where_nonfinite([torch.tensor([[0.0, 1.0], [float("nan"), 2.0]])])
        '`batch[0]` (sample 1, column 0)'
    """
    tensors = {} if batch is None else dict(named_tensors(batch))
    names = nonfinite_names(tensors.items())
    if not names:
        return ""
    samples, columns = nonfinite_rows(tensors[names[0]])
    parts = [_some("sample", samples), _some("column", columns) if columns else ""]
    first = f"`{names[0]}` ({', '.join(filter(None, parts))})" if samples else f"`{names[0]}`"
    return ", ".join([first, *([listed(names[1:])] if names[1:] else [])])


def _some(kind: str, numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:SHOWN_NAMES]))
    more = f" and {len(numbers) - SHOWN_NAMES} more" if len(numbers) > SHOWN_NAMES else ""
    return f"{kind}{'s' if len(numbers) > 1 else ''} {shown}{more}"


def poisoned_attributes(module: nn.Module) -> list[str]:
    """Plain attributes of a module or its parts that hold a non-finite tensor, such as a hidden state kept for later.

    They are no buffers: no copy of them is kept, and nothing restores them.
    """
    found = []
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name not in _OF_TORCH and not isinstance(value, nn.Module):
                prefix = f"{path}.{name}" if path else name
                tensors = dict(named_tensors(value, prefix))
                # (masks are made of -inf)
                found += [name for name in nonfinite_names(tensors.items()) if _has_nan_or_inf(tensors[name])]
    return found


def _has_nan_or_inf(tensor: Tensor) -> bool:
    dense = tensor.to_dense() if tensor.layout != torch.strided else tensor
    return bool(torch.isnan(dense).any() or torch.isposinf(dense.real).any())


_OF_TORCH = frozenset(
    (*vars(nn.Module()), "_trainer", "_fabric", "_log_hyperparams", "_hparams", "prepare_data_per_node")
)
