"""Which tensors of a module can be copied and compared, and how many are looked at in one pass."""

from __future__ import annotations

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
    if value.layout != torch.strided or value.is_nested or value.is_quantized or value.is_meta or not value.numel():
        return None
    return value.data.as_subclass(Tensor)


def is_writable(tensor: Tensor) -> bool:
    """Not so if elements share their memory, as those of an expanded tensor do, or if it is an inference tensor."""
    apart = all(stride or size < 2 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return apart and not tensor.is_inference()


def values_of(tensor: Tensor | None) -> Tensor | None:
    """What a tensor of any layout holds in this process, to be read only; None if it holds no checked numbers."""
    if tensor is None or is_lazy(tensor) or tensor.is_meta or tensor.is_quantized:
        return None
    local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()  # (a DTensor's)
    if local.layout == torch.sparse_coo:
        local = local.coalesce().values()
    elif local.layout != torch.strided or local.is_nested:
        local = local.values()
    if has_own_dispatch(local) or local.dtype not in CHECKED or not local.numel():
        return None
    local = local.as_subclass(Tensor)
    return torch.view_as_real(local.resolve_conj()) if local.is_complex() else local


def sizes_of(tensors: list[Tensor]) -> list[float]:
    """The sum of each tensor's absolute values: NaN or infinite if it holds such a value, another if it was written.

    (Of very large finite values the sum may be infinite, too.) One pass and one read for each device.

    Args:
        tensors: As `values_of` gives them.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(place)
    by_device: dict[torch.device, tuple[list[int], list[Tensor]]] = {}
    for (device, dtype), places in kinds.items():
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        norms = norm_of_each([tensors[place] for place in places], 1, wide)
        all_places, all_norms = by_device.setdefault(device, ([], []))
        all_places += places
        all_norms.append(torch.stack(norms).to(torch.float32 if device.type == "mps" else torch.float64))
    sizes = [0.0] * len(tensors)
    for all_places, all_norms in by_device.values():
        for place, size in zip(all_places, torch.cat(all_norms).tolist(), strict=True):
            sizes[place] = size
    return sizes
