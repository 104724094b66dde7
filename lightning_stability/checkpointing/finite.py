"""Which tensors hold a NaN or an infinity: one pass on the device, one number read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

NamedTensors = Iterable[tuple[str, Tensor]]


@torch.no_grad()
def nonfinite_names(tensors: NamedTensors) -> list[str]:
    """Return the names of the tensors that are not finite throughout.

    All tensors of one device and dtype are read in one multi-tensor pass; the host waits once per device.

    Args:
        tensors: Names and tensors; those that cannot hold such a value are passed over.

    Example:
        >>> nonfinite_names([("a", torch.ones(3)), ("b", torch.tensor([0.0, float("nan")])), ("c", torch.tensor(1))])
        ['b']
    """
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[str], list[Tensor]]] = defaultdict(lambda: ([], []))
    for name, tensor in tensors:
        values = _as_floats(tensor)
        if values is not None:
            names, held = groups[values.device, values.dtype]
            names.append(name)
            held.append(values)
    bad: dict[torch.device, list[Tensor]] = defaultdict(list)
    order: dict[torch.device, list[str]] = defaultdict(list)
    for (device, _), (names, held) in groups.items():
        # the largest magnitude of each: it is NaN or inf if any number is, and no square overflows on the way
        norms = torch._foreach_norm(held, float("inf"))  # type: ignore[no-untyped-call]
        bad[device].append(~torch.isfinite(torch.stack(norms)))
        order[device] += names
    found: list[str] = []
    for device, flags in bad.items():
        found += [name for name, is_bad in zip(order[device], torch.cat(flags).tolist(), strict=True) if is_bad]
    return found


def named_tensors(tree: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Walk nested dicts, lists and tuples.

    Args:
        tree: What to walk.
        prefix: Put before every name.

    Yields:
        The path of each tensor, joined with dots, and the tensor.
    """
    if isinstance(tree, Tensor):
        yield prefix, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from named_tensors(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from named_tensors(value, f"{prefix}.{index}" if prefix else str(index))


def _as_floats(tensor: Tensor) -> Tensor | None:
    if hasattr(tensor, "to_local"):  # a DTensor: this rank's part
        tensor = tensor.to_local()
    if tensor.is_sparse:
        tensor = tensor._values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.detach())
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.device.type == "meta":
        return None
    if tensor.dtype.itemsize == 1:  # float8 has no norm
        tensor = tensor.to(torch.float32)
    return tensor.detach()
