"""The rules by which a tensor of a batch is judged, once: torch executes them and so do the Triton kernels."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (Triton would read the annotations of `judge` itself.)

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch as ops  # within `judge`; `input_kernels` compiles the same source with triton.language in this place
from torch import Tensor

FIELDS = (
    "abs_max",  # of the finite values, like all that follow
    "std",
    "mean",
    "nonfinite",  # how many values are not
    "usual_std",  # of earlier batches; nan without any
    "is_nonfinite",
    "is_beyond_max_abs",
    "is_constant",
    "is_drifted",
    "constant_channels",  # that are so for the first time
    "first_constant_channel",
    "is_mask",  # -inf beside nothing but 0
    "is_unwanted",  # for any of these but a constant channel
)
"""What a row of `TensorStats` holds, in this order, all float64."""
WIDTH = len(FIELDS)
REMEMBERED = 5  # numbers of a tensor's earlier batches: `TensorState.scale`
ADOPTED = 8
"""After so many batches in a row of another scale, or half as many if the first alone had it, theirs is the usual."""


@dataclass(slots=True, frozen=True)
class Limits:
    """What a tensor is judged by.

    Attributes:
        max_abs: The largest magnitude.
        log_ratio: The largest distance of the logarithm of its standard deviation from the usual.
        watch_channels: Whether dimension 1 numbers channels that may be constant.
        has_past: Whether there were batches before; without, nothing can differ from them.
    """

    max_abs: float
    log_ratio: float
    watch_channels: bool
    has_past: bool


@dataclass(slots=True, eq=False)
class TensorState:
    """What is remembered of a tensor's earlier batches, on its device.

    Attributes:
        scale: Float64, how many batches were counted in, the mean of the logarithms of their standard deviations, the
            mean of their means, how many in a row have differed from it since, and by how many more batches held
            values that are not finite (masks aside) than did not.
        channels: Int8, 1 for each channel that was constant in a batch before; None if dimension 1 does not number
            channels, since its size changes.
        batches: How many batches were measured.
        stamps: Int32, the last batch in which each channel varied; scratch memory of the kernels.
        partials: Float64, what the first kernel leaves to the second; likewise.
    """

    scale: Tensor
    channels: Tensor | None
    batches: int = 0
    stamps: Tensor | None = None
    partials: Tensor | None = None


def judge(
    largest, std, mean, total, nonfinite, negative, new,
    batches, log_mean, usual_mean, streak, balance,
    max_abs, log_ratio, has_past,
):  # fmt: skip
    """The verdict on one tensor of one batch, and what to remember after it; `InputMeter` says what the rules are for.

    Executed on the device, by torch and by Triton: only what both know may stand here (a test holds that).
    `total` counts the finite values, `negative` those that are -inf, `new` the channels that are constant for the first
    time; the second line is `TensorState.scale`, the third `Limits`.
    """
    is_mask = (nonfinite > 0.0) & (negative == nonfinite) & (total > 0.0) & (largest == 0.0)
    holds_nonfinite = (nonfinite > 0.0) & (is_mask == 0)
    is_nonfinite = holds_nonfinite & (balance <= 0.0) & (has_past != 0)
    is_beyond = largest > max_abs
    is_constant = (new > 0) & (has_past != 0) & (batches > 0.0)
    log_std = ops.log(ops.where(std > 0.0, std, 1.0))
    is_drifted = (batches > 0.0) & (std > 0.0) & (ops.abs(log_std - log_mean) > log_ratio)
    is_unwanted = is_nonfinite | is_beyond | is_drifted
    usual_std = ops.where(batches > 0.0, ops.exp(log_mean), float("nan"))

    is_counted = (std > 0.0) & (is_unwanted == 0)
    differs = is_drifted & (is_beyond == 0)
    streak = streak + ops.where(differs, 1.0, 0.0)
    is_adopted = differs & (streak >= ops.where(batches > 1.0, ADOPTED, ADOPTED // 2))
    count = batches + 1.0
    batches = ops.where(is_adopted, 1.0, ops.where(is_counted, count, batches))
    moved = ops.where(is_counted, log_mean + (log_std - log_mean) / count, log_mean)
    log_mean = ops.where(is_adopted, log_std, moved)
    moved = ops.where(is_counted, usual_mean + (mean - usual_mean) / count, usual_mean)
    usual_mean = ops.where(is_adopted, mean, moved)
    streak = ops.where(is_counted | is_adopted, 0.0, streak)
    balance = balance + ops.where(holds_nonfinite, 1.0, -1.0)
    return (
        usual_std, is_nonfinite, is_beyond, is_constant, is_drifted, is_mask, is_unwanted,
        batches, log_mean, usual_mean, streak, balance,
    )  # fmt: skip


def judge_with_torch(
    largest: Tensor,
    std: Tensor,
    mean: Tensor,
    total: Tensor,
    nonfinite: Tensor,
    negative: Tensor,
    constant: Tensor | None,
    state: TensorState,
    limits: Limits,
) -> Tensor:
    """A row as `FIELDS` says; the state is brought up to date."""
    new, first = torch.zeros_like(largest), torch.full_like(largest, -1)
    if constant is not None and state.channels is not None:
        fresh = constant & (state.channels == 0)
        new = fresh.sum().to(largest.dtype)
        first = torch.where(new > 0, fresh.to(torch.uint8).argmax().to(largest.dtype), -1.0)
        state.channels = torch.maximum(state.channels, constant.to(torch.int8))
    batches, log_mean, usual_mean, streak, balance = state.scale
    verdict = judge(
        largest, std, mean, total, nonfinite, negative, new,
        batches, log_mean, usual_mean, streak, balance,
        limits.max_abs, limits.log_ratio, limits.has_past,
    )  # fmt: skip
    usual_std, is_nonfinite, is_beyond, is_constant, is_drifted, is_mask, is_unwanted, *remembered = verdict
    state.scale = torch.stack(remembered)
    flags = [flag.to(largest.dtype) for flag in (is_nonfinite, is_beyond, is_constant, is_drifted)]
    last = [flag.to(largest.dtype) for flag in (is_mask, is_unwanted)]
    return torch.stack([largest, std, mean, nonfinite, usual_std, *flags, new, first, *last])
