"""What is wrong with a batch, in words, once its numbers are on the host."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import strided

from lightning_stability.health.input_rules import FIELDS
from lightning_stability.health.inputs import TensorStats
from lightning_stability.health.values import named_tensors

Reason = Literal["nonfinite", "max_abs", "constant", "scale"]
LISTED = 8


@dataclass(slots=True, frozen=True)
class Finding:
    """One thing that is wrong with one tensor of a batch.

    Attributes:
        tensor: Its name.
        reason: What is wrong.
        value: How many values are not finite; the largest magnitude; the first constant channel; the std.
        samples: Positions of the samples at fault, the worst first, with each one's own value; none where the batch as
            a whole is.
        text: The same in words.
    """

    tensor: str
    reason: Reason
    value: float
    samples: tuple[tuple[int, float], ...]
    text: str

    @property
    def is_unwanted(self) -> bool:
        """Whether the batch is not to be trained on for it."""
        return self.reason != "constant"


def findings_of(
    stats: TensorStats, row: Sequence[float], max_abs: float | None, max_scale_ratio: float
) -> list[Finding]:
    """What a tensor was flagged for; reads its samples' numbers from the device. `row` is its own, on the host."""
    values = dict(zip(FIELDS, row, strict=True))
    samples = stats.samples.numpy(force=True)
    name, findings = f"`{stats.name}`", []

    def add(reason: Reason, value: float, text: str, at_fault: tuple[tuple[int, float], ...] = ()) -> None:
        findings.append(Finding(stats.name, reason, value, at_fault, text))

    if values["is_nonfinite"]:
        findings.append(_nonfinite(stats, values, samples))
    if values["is_beyond_max_abs"]:
        largest = values["abs_max"]
        text = f"{name} has a magnitude of {largest:.4g}, beyond max_abs={max_abs:g}"
        add("max_abs", largest, text, _worst_first(samples[:, 0], samples[:, 0] > max_abs))
    if values["is_constant"]:
        first, count = int(values["first_constant_channel"]), int(values["constant_channels"])
        which = f"channel {first} of {name} is" if count == 1 else f"{count} channels of {name}, {first} first, are"
        add("constant", first, f"{which} constant, and varied in every batch before")
    if values["is_drifted"]:
        std, usual, spread = values["std"], values["usual_std"], samples[:, 2]
        if std > usual:
            far = spread > max_scale_ratio * usual
            text = f"the std of {name} is {std:.4g}, {std / usual:,.0f} times its usual {usual:.4g}"
            add("scale", std, text, _worst_first(spread, far if far.any() else spread == spread.max()))
        else:
            text = f"the std of {name} is {std:.4g}; usually it is {usual:.4g}, {usual / std:,.0f} times"
            add("scale", std, text)
    return findings


def nonfinite_by_design(stats: TensorStats, row: Sequence[float]) -> Finding | None:
    """What a tensor holds that is not finite and was not flagged; None for nothing and for a mask."""
    values = dict(zip(FIELDS, row, strict=True))
    if not values["nonfinite"] or values["is_nonfinite"] or values["is_mask"]:
        return None
    return _nonfinite(stats, values, stats.samples.numpy(force=True))


def _nonfinite(stats: TensorStats, values: Mapping[str, float], samples: Any) -> Finding:
    count = int(values["nonfinite"])
    which = "a value that is" if count == 1 else f"{count:,} values that are"
    at_fault = _worst_first(samples[:, 1], samples[:, 1] > 0)
    return Finding(stats.name, "nonfinite", count, at_fault, f"`{stats.name}` holds {which} not finite")


def _worst_first(of_samples: Any, at_fault: Any) -> tuple[tuple[int, float], ...]:
    places = np.flatnonzero(at_fault)
    places = places[np.argsort(-of_samples[places], kind="stable")]
    return tuple((int(place), float(of_samples[place])) for place in places)


def constant_by_design(stats: TensorStats, constant: Sequence[int]) -> str | None:
    """Which channels of a first batch are constant, in words, by their mask on the host; None if none is."""
    channels = np.flatnonzero(constant).tolist()
    if not channels:
        return None
    more = f" and {len(channels) - LISTED} more" if channels[LISTED:] else ""
    noun, verb = ("channel", "is") if len(channels) == 1 else ("channels", "are")
    return f"{noun} {', '.join(map(str, channels[:LISTED]))}{more} of `{stats.name}` {verb} constant"


def why_nothing_is_checked(batch: Any) -> str | None:
    """Why no tensor of a batch is checked, and what to do; None if it is for being empty alone.

    Example:
        >>> import torch
        >>> why_nothing_is_checked({"image": torch.zeros(1, 3, 4, 4, dtype=torch.uint8)}).split(",")[0]
        "the first batch holds no floating tensor (`batch['image']` is uint8)"
    """
    tensors = list(named_tensors(batch))
    if any(tensor.is_floating_point() and tensor.layout == strided for _, tensor in tensors):
        return None
    listed = [f"`{name}` is {str(tensor.dtype).removeprefix('torch.')}" for name, tensor in tensors[:LISTED]]
    return (
        f"the first batch holds no floating tensor ({', '.join(listed) or 'nor any other'}), so that nothing is looked"
        " at. Images of uint8 and the like are looked at if the dataset makes them floats, or if the module's"
        " `on_after_batch_transfer` does (not in 16-true)."
    )


def key_of(name: str) -> str:
    """A tensor's name in the keys of a logger.

    Example:
        >>> key_of("batch['eeg']"), key_of("batch[0].x")
        ('eeg', '0.x')
    """
    parts = re.findall(r"\[['\"]?(.*?)['\"]?\]|\.(\w+)", name)
    return ".".join(first or second for first, second in parts) or name
