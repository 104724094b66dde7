"""What is wrong with a batch, in words, once its numbers are on the host."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor, strided

from lightning_stability.health.inputs import FIELDS, TensorLook
from lightning_stability.health.values import named_tensors

Reason = Literal["nonfinite", "max_abs", "constant", "scale"]
SMALL = 4096
"""Values up to which a tensor of labels is small."""
LISTED = 8


@dataclass(slots=True, frozen=True)
class Finding:
    """One thing that is wrong with one tensor of a batch.

    Attributes:
        tensor: Its name.
        reason: What is wrong.
        value: How many values are not finite; the largest magnitude; the first constant channel; the deviation.
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


def findings_of(look: TensorLook, row: Sequence[float], max_abs: float | None, max_scale_ratio: float) -> list[Finding]:
    """What a flagged tensor was flagged for; reads its samples' numbers from the device.

    Args:
        look: The look at it.
        row: Its row, on the host.
        max_abs: The limit that it was judged by.
        max_scale_ratio: The limit that it was judged by.
    """
    said = dict(zip(FIELDS, row, strict=True))
    samples = look.samples.numpy(force=True)
    name, findings = f"`{look.name}`", []

    def add(reason: Reason, value: float, text: str, of_samples: Any = None, at_fault: Any = None) -> None:
        findings.append(Finding(look.name, reason, value, _worst_first(of_samples, at_fault), text))

    if said["is_nonfinite"]:
        findings.append(_nonfinite(look, said, samples))
    if said["is_beyond_max_abs"]:
        largest = said["abs_max"]
        text = f"{name} has a magnitude of {largest:.4g}, beyond max_abs={max_abs:g}"
        add("max_abs", largest, text, samples[:, 0], samples[:, 0] > max_abs)
    if said["is_constant"]:
        first, count = int(said["first_constant_channel"]), int(said["constant_channels"])
        which = f"channel {first} of {name} is" if count == 1 else f"{count} channels of {name}, {first} first, are"
        add("constant", first, f"{which} constant, and varied in every batch before")
    if said["is_drifted"]:
        std, usual = said["std"], said["usual_std"]
        if std > usual:
            at_fault = samples[:, 2] > max_scale_ratio * usual
            if not at_fault.any():
                at_fault = samples[:, 2] == samples[:, 2].max()
            text = f"the deviation of {name} is {std:.4g}, {std / usual:,.0f} times its usual {usual:.4g}"
            add("scale", std, text, samples[:, 2], at_fault)
        else:
            add(
                "scale",
                std,
                f"the deviation of {name} is {std:.4g}; usually it is {usual:.4g}, {usual / std:,.0f} times",
            )
    return findings


def nonfinite_by_design(look: TensorLook, row: Sequence[float]) -> Finding | None:
    """What a tensor holds that is not finite and was not flagged; None for nothing and for a mask.

    Args:
        look: The look at it.
        row: Its row, on the host.
    """
    said = dict(zip(FIELDS, row, strict=True))
    if not said["nonfinite"] or said["is_nonfinite"] or said["is_mask"]:
        return None
    return _nonfinite(look, said, look.samples.numpy(force=True))


def _nonfinite(look: TensorLook, said: Mapping[str, float], samples: Any) -> Finding:
    count = int(said["nonfinite"])
    which = "a value that is" if count == 1 else f"{count:,} values that are"
    at_fault = _worst_first(samples[:, 1], samples[:, 1] > 0)
    return Finding(look.name, "nonfinite", count, at_fault, f"`{look.name}` holds {which} not finite")


def _worst_first(of_samples: Any, at_fault: Any) -> tuple[tuple[int, float], ...]:
    if of_samples is None:
        return ()
    places = np.flatnonzero(at_fault)
    places = places[np.argsort(-of_samples[places], kind="stable")]
    return tuple((int(place), float(of_samples[place])) for place in places)


def constant_by_design(look: TensorLook, constant: Sequence[int]) -> str | None:
    """Which channels of a first batch are constant, in words; None if none is.

    Args:
        look: The look at it.
        constant: Its mask, on the host.
    """
    channels = np.flatnonzero(constant).tolist()
    if not channels:
        return None
    listed = ", ".join(map(str, channels[:LISTED])) + (
        f" and {len(channels) - LISTED} more" if channels[LISTED:] else ""
    )
    one = len(channels) == 1
    return f"{'channel' if one else 'channels'} {listed} of `{look.name}` {'is' if one else 'are'} constant"


def why_nothing_to_look_at(batch: Any) -> str | None:
    """Why no tensor of a batch is looked at, and what to do; None if it is for being empty alone.

    Example:
        >>> import torch
        >>> why_nothing_to_look_at({"image": torch.zeros(1, 3, 4, 4, dtype=torch.uint8)}).split(",")[0]
        "the first batch holds no floating tensor (`batch['image']` is uint8)"
    """
    tensors = list(named_tensors(batch))
    if any(tensor.is_floating_point() and tensor.layout == strided for _, tensor in tensors):
        return None
    listed = [f"`{name}` is {str(tensor.dtype).removeprefix('torch.')}" for name, tensor in tensors[:LISTED]]
    return (
        f"the first batch holds no floating tensor ({', '.join(listed) or 'nor any other'}), so that nothing is looked"
        " at. Images of uint8 and the like are looked at if the dataset makes them floats or, but for 16-true, the"
        " module's `on_after_batch_transfer` does."
    )


def small_members(batch: Any) -> Any:
    """A batch without its large tensors, which would otherwise stay in memory: labels, ids and names are kept.

    Args:
        batch: Tensors in dicts, lists, tuples, dataclasses and named tuples.

    Returns:
        The same nesting, with None for every tensor that is neither one-dimensional or less nor integer, or that is
        too long; what it keeps is not copied.

    Example:
        >>> import torch
        >>> small_members({"eeg": torch.zeros(2, 19, 2048), "label": torch.tensor([0, 1]), "name": ["a", "b"]})
        {'eeg': None, 'label': tensor([0, 1]), 'name': ['a', 'b']}
    """
    if isinstance(batch, (Tensor, np.ndarray)):
        ndim, size = batch.ndim, batch.numel() if isinstance(batch, Tensor) else batch.size
        integer = not batch.is_floating_point() if isinstance(batch, Tensor) else batch.dtype.kind in "iub"
        return batch if size <= SMALL and (ndim <= 1 or integer) else None
    if isinstance(batch, Mapping):
        return {key: small_members(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(small_members, batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map(small_members, batch)) if type(batch) in (list, tuple) else None
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        kept = copy.copy(batch)
        for field in dataclasses.fields(batch):
            object.__setattr__(kept, field.name, small_members(getattr(batch, field.name)))
        return kept
    return batch if isinstance(batch, (str, bytes, int, float, bool, type(None))) else None


def key_of(name: str) -> str:
    """A tensor's name in the keys of a logger.

    Example:
        >>> key_of("batch['eeg']"), key_of("batch[0].x")
        ('eeg', '0.x')
    """
    parts = re.findall(r"\[['\"]?(.*?)['\"]?\]|\.(\w+)", name)
    return ".".join(first or second for first, second in parts) or name


class Ranges:
    """The smallest and largest of some numbers that were seen, by name.

    Example:
        >>> ranges = Ranges()
        >>> ranges.add("x", 3.0), ranges.add("x", 1.0)
        (None, None)
        >>> ranges.of("x")
        (1.0, 3.0)
    """

    def __init__(self, seen: Mapping[str, Sequence[float]] | None = None) -> None:
        self._seen = {name: list(pair) for name, pair in (seen or {}).items()}

    def add(self, name: str, value: float) -> None:
        """See a number; one that is not finite is passed over."""
        if math.isfinite(value):
            least, largest = self._seen.setdefault(name, [value, value])
            self._seen[name] = [min(least, value), max(largest, value)]

    def of(self, name: str) -> tuple[float, float] | None:
        """Both ends; None if nothing was seen."""
        pair = self._seen.get(name)
        return None if pair is None else (pair[0], pair[1])

    def state_dict(self) -> dict[str, list[float]]:
        """Everything."""
        return dict(self._seen)
