"""The range of a tensor's values, and the rows in which they are not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_stability.internals import strided_values

_MOST_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Range:
    """What a tensor held: its smallest and largest finite value, and which non-finite ones."""

    min: float
    max: float
    nan: int = 0
    posinf: int = 0
    neginf: int = 0

    @property
    def infinite(self) -> int:
        """How many values were infinite."""
        return self.posinf + self.neginf

    @property
    def nonfinite(self) -> int:
        """How many values were NaN or infinite."""
        return self.nan + self.infinite


@torch.no_grad()
def range_of(tensor: Tensor) -> Range:
    """The range of a tensor's values; one look at the device where they are finite.

    Args:
        tensor: Floating or complex.
    """
    values = dense_values(tensor)
    if not values.numel():
        return Range(math.nan, math.nan)
    low, high = torch.stack(torch.aminmax(values)).tolist()
    if math.isfinite(low) and math.isfinite(high):
        return Range(low, high)
    nan, posinf, neginf = torch.stack(
        [torch.isnan(values).sum(), torch.isposinf(values).sum(), torch.isneginf(values).sum()]
    ).tolist()
    finite = values[torch.isfinite(values)]
    low, high = torch.stack(torch.aminmax(finite)).tolist() if finite.numel() else (math.nan, math.nan)
    return Range(low, high, nan, posinf, neginf)


def nonfinite_rows(tensor: Tensor) -> tuple[tuple[int, ...], int]:
    """The rows in which a tensor is not finite, and how many it has; none where there are too many to look at.

    Args:
        tensor: Floating or complex.
    """
    values = dense_values(tensor)
    if not values.dim() or len(values) > _MOST_ROWS:
        return (), 0
    rows = (~torch.isfinite(values)).reshape(len(values), -1).any(dim=1)
    return tuple(rows.nonzero().flatten().tolist()), len(values)


def rows_born(result: Tensor, inputs: list[Tensor]) -> tuple[tuple[int, ...], int]:
    """The rows in which a result is not finite; not those where it is no other infinity than what went in there."""
    values = dense_values(result)
    if not values.dim() or len(values) > _MOST_ROWS:
        return (), 0
    bad = ~torch.isfinite(values)
    born = bad.clone()
    for tensor in inputs:
        if has_floats(tensor) and tensor.shape == result.shape and tensor.is_complex() == result.is_complex():
            born &= dense_values(tensor).to(values.device) != values  # (a copy may come from another device)
    rows = (born if bool(born.any()) else bad).reshape(len(values), -1).any(dim=1)
    return tuple(rows.nonzero().flatten().tolist()), len(values)


def rows_of(whole: Tensor, view: Tensor) -> tuple[tuple[int, ...], int]:
    """The rows of a tensor in which a view of it is not finite: a view may have another first dimension."""
    stride = whole.stride(0) if whole.dim() and whole.layout == torch.strided else 0
    if not stride or stride * len(whole) < whole.numel() or view.dtype != whole.dtype or len(whole) > _MOST_ROWS:
        return nonfinite_rows(view)
    places = (~torch.isfinite(view)).nonzero()
    offsets = (places * torch.tensor(view.stride(), device=places.device)).sum(dim=1)
    rows = (offsets + int(view.storage_offset()) - int(whole.storage_offset())) // stride
    return tuple(sorted(set(rows.tolist()))), len(whole)


def has_floats(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers that may be non-finite."""
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.device.type != "meta"


def dense_values(tensor: Tensor) -> Tensor:
    """Its values as plain real numbers.

    Args:
        tensor: Floating or complex.
    """
    tensor = strided_values(tensor.detach())
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor
