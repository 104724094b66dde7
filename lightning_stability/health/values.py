"""Which tensors of a module or a batch are not finite, by name; a look that waits for the device."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def nonfinite_names(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those tensors that hold NaN or infinity, in their order.

    All tensors of one device and dtype are read in one multi-tensor pass; the host waits once per device.

    Args:
        tensors: Names and tensors, as `named_parameters()` gives them; those that cannot hold such a value are passed
            over.

    Example:
        >>> nonfinite_names([("a", torch.zeros(2)), ("b", torch.tensor([1.0, float("nan")])), ("c", torch.tensor(1))])
        ['b']
    """
    names: list[str] = []
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[int], list[Tensor]]] = defaultdict(lambda: ([], []))
    for name, tensor in tensors:
        values = _as_floats(tensor)
        if values is not None:
            places, held = groups[values.device, values.dtype]
            places.append(len(names))
            held.append(values)
            names.append(name)
    flags: dict[torch.device, list[Tensor]] = defaultdict(list)
    order: dict[torch.device, list[int]] = defaultdict(list)
    for (device, _), (places, held) in groups.items():
        # the largest magnitude of each: it is NaN or inf if any number is, and no square overflows on the way
        norms = torch._foreach_norm(held, float("inf"))  # type: ignore[no-untyped-call]
        flags[device].append(~torch.isfinite(torch.stack(norms)))
        order[device] += places
    bad: list[int] = []
    for device, of_device in flags.items():
        found = torch.cat(of_device).tolist()
        bad += [place for place, is_bad in zip(order[device], found, strict=True) if is_bad]
    return [names[place] for place in sorted(bad)]


def named_tensors(batch: Any, name: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch, whatever their nesting, with a name that says where they are.

    Args:
        batch: Tensors in dicts, lists, tuples, dataclasses, named tuples, and attributes of what has a method `to`,
            which Lightning moves to a device by that.
        name: What the batch itself is called.

    Example:
        >>> [name for name, _ in named_tensors({"eeg": torch.zeros(1), "rest": [torch.zeros(1)]})]
        ["batch['eeg']", "batch['rest'][0]"]
    """
    yield from _walk(batch, name, ())


def _walk(batch: Any, name: str, within: tuple[Any, ...]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _walk(value, f"{name}[{key!r}]", within)
    elif isinstance(batch, tuple) and hasattr(batch, "_fields"):
        for key in batch._fields:
            yield from _walk(getattr(batch, key), f"{name}.{key}", within)
    elif isinstance(batch, (list, tuple)):
        for index, value in enumerate(batch):
            yield from _walk(value, f"{name}[{index}]", within)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for item in dataclasses.fields(batch):
            yield from _walk(getattr(batch, item.name), f"{name}.{item.name}", within)
    elif _is_of_own_class(batch) and not any(batch is outer for outer in within):  # nor to its parent and back
        for key, value in vars(batch).items():
            yield from _walk(value, f"{name}.{key}", (*within, batch))


def _is_of_own_class(batch: Any) -> bool:
    return (
        callable(getattr(batch, "to", None)) and hasattr(batch, "__dict__") and not isinstance(batch, (nn.Module, type))
    )


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
