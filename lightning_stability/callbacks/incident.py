"""What became non-finite in a bad step, in a word and in a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stability.health.record import StepRecord
from lightning_stability.health.values import named_tensors, nonfinite_names

SHOWN_NAMES = 3


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
        rank = record.bad_loss_ranks[0] if several_ranks and record.bad_loss_ranks else None
        return cls(what, why, record.step, record.epoch, record.batch_idx, rank)

    @property
    def place(self) -> str:
        """Where it was, in words."""
        batch = f", batch {self.batch_idx}" if self.batch_idx >= 0 else ""
        rank = f", rank {self.rank}" if self.rank is not None else ""
        return f"epoch {self.epoch}{batch}, global step {self.step}{rank}"


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are.

    Args:
        names: Of tensors.

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
        bad = [] if batch is None else nonfinite_names(named_tensors(batch))
        holds = f"; {listed(bad)} holds non-finite values" if bad else ""
        return "input", f"`training_step` raised {record.exception}{holds}"
    if record.bad_loss_ranks or not record.loss_finite:
        bad = [] if batch is None else nonfinite_names(named_tensors(batch))
        value = "not finite" if record.loss is None or record.loss_finite else f"{record.loss:g}"
        if bad:
            return "input", f"the loss was {value}, and so was the input: {listed(bad)} holds non-finite values"
        return "loss", f"the loss was {value}"
    if record.nonfinite_buffer is not None:
        return "buffer", f"the forward pass made the buffer `{record.nonfinite_buffer}` non-finite (restored)"
    if record.skipped_by == "GradScaler":
        scale = f"{record.loss_scale:g}" if record.loss_scale is not None else "unknown"
        return "loss_scale", f"gradients overflow at every loss scale; it has fallen to {scale}"
    if record.loss is None and record.gradients_finite:
        return "loss", "what `training_step` logged was not finite, and it returned no loss"
    where = f"the gradient of `{record.culprit}`" if record.culprit else "a gradient"
    if record.gradients == "overflow":
        return "gradient", f"the gradients were finite but their squares overflow fp32; the largest is {where}"
    verdict = "not finite" if record.gradients_finite else record.gradients
    of_loss = "" if record.loss is None else " while the loss was finite"
    return "gradient", f"{where} was {verdict}{of_loss}"


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
