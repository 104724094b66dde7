"""Which tensors of a module can be copied and compared, and how many are looked at in one pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_stability.internals import has_own_dispatch, norm_of_each

CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
"""The kinds of numbers that can be non-finite; torch cannot compare those of eight bits."""


def dense(value: Tensor | None) -> Tensor | None:
    """A tensor's own memory as a plain strided tensor that does not count writes; None if it has none.

    Lazy, sparse, nested, quantised, empty and meta tensors have none, nor do those whose class computes for itself.
    """
    if value is None or is_lazy(value) or has_own_dispatch(value):
        return None
    if (
        value.layout != torch.strided
        or value.is_nested
        or value.is_quantized
        or value.is_meta
        or not _has_values(value)
    ):
        return None
    return value.data.as_subclass(Tensor)


def _has_values(tensor: Tensor) -> bool:
    """Not so if it has no elements, or if its memory is freed for a while, as FSDP does."""
    return tensor.numel() > 0 and tensor.untyped_storage().size() > 0


def is_writable(tensor: Tensor) -> bool:
    """Not so if elements share their memory, as those of an expanded tensor do, or if it is an inference tensor."""
    apart = all(stride or size < 2 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return apart and not tensor.is_inference()


def values_of(tensor: Tensor | None) -> Tensor | None:
    """What a tensor of any layout holds in this process, to be read only; None if it holds no checked numbers."""
    if tensor is None or is_lazy(tensor) or tensor.is_meta or tensor.is_quantized:
        return None
    try:
        local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()  # (a DTensor's)
        if local.layout == torch.sparse_coo:
            local = local.coalesce().values()
        elif local.layout != torch.strided or local.is_nested:
            local = local.values()
        if has_own_dispatch(local) or local.dtype not in CHECKED or not _has_values(local):
            return None
        local = local.as_subclass(Tensor)
        return torch.view_as_real(local.resolve_conj()) if local.is_complex() else local
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError):  # a kind that nobody foresaw
        return None


def sizes_by_device(tensors: list[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """The sum of each tensor's absolute values: NaN or infinite if it holds such a value, another if it was written.

    One pass over all tensors of a device and dtype.

    Args:
        tensors: As `values_of` gives them.

    Yields:
        For each device, which of the tensors are there, and a vector of their sums.
    """
    kinds: dict[torch.device, dict[torch.dtype, list[int]]] = {}
    for place, tensor in enumerate(tensors):
        kinds.setdefault(tensor.device, {}).setdefault(tensor.dtype, []).append(place)
    for device, by_dtype in kinds.items():
        # wide enough for any sum of finite float32 values
        wide = torch.float32 if device.type == "mps" else torch.float64
        norms = [norm for places in by_dtype.values() for norm in norm_of_each([tensors[i] for i in places], 1, wide)]
        yield [place for places in by_dtype.values() for place in places], torch.stack(norms)


def sizes_of(tensors: list[Tensor]) -> list[float]:
    """The same on the host, by one read for each device."""
    sizes = [0.0] * len(tensors)
    for places, on_device in sizes_by_device(tensors):
        for place, size in zip(places, on_device.tolist(), strict=True):
            sizes[place] = size
    return sizes
