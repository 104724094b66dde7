"""The order of training data: which samplers keep it themselves, and how the order of the others is drawn again."""

from __future__ import annotations

import inspect
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_stability._compat import is_instance_by_name
from lightning_stability.recovery.random_state import (
    GENERATORS,
    RandomState,
    generator_state,
    set_generator_state,
)

OrderState = dict[str, Any]
"""From what a loader's next order is drawn: `random`, the global generators, and `own`, the sampler's own state."""

OwnState = dict[str, Any]
"""The generators and the plain attributes that an object and its parts keep."""

_MAX_ITEMS = 64
_MAX_NUMBERS = 10_000
_MAX_DEPTH = 5
_LIBRARIES = ("torch.", "torchdata.", "pytorch_lightning.", "lightning.", "lightning_fabric.")
_PLAIN = (bool, int, float, str, type(None))
_RUNNING: tuple[type[Any], ...] = (
    types.GeneratorType,
    map,
    filter,
    zip,
    enumerate,
    type(iter([])),
    type(iter(())),
    type(iter(range(0))),
)


def is_stateful(loader: Any) -> bool:
    """Whether something can be saved in the middle."""
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


def has_positions(loader: Any) -> bool:
    """Whether it reads samples by their indices, so that batches can be left out in the sampler."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def deals_out_anothers_order(loader: Any) -> bool:
    """Whether Lightning deals out among ranks what each of them draws."""
    sampler = _sampler(loader)
    sampler = sampler.inner if isinstance(sampler, FixedOrder) else sampler
    return is_instance_by_name(sampler, "DistributedSamplerWrapper")


def order_is_known(loader: Any) -> bool:
    """Whether a sampler can continue from the loader's state: it has one of its own, or draws no random numbers.

    Lightning's DistributedSamplerWrapper does neither. It deals out among ranks what each of them draws.
    """
    if _has_own_batches(loader):
        return False
    sampler = _sampler(loader)
    if sampler is None or not hasattr(sampler, "__len__"):
        return True
    if isinstance(sampler, FixedOrder) or is_instance_by_name(sampler, "DistributedSamplerWrapper"):
        return False
    return (
        type(sampler).__module__.startswith("torchdata.")
        or is_stateful(sampler)
        or is_instance_by_name(sampler, "SequentialSampler", "DistributedSampler", "_InfiniteConstantSampler")
    )


def unknown_orders(loader: Any) -> list[str]:
    """What keeps a loader's order from being drawn again, in a phrase each; empty if nothing was found."""
    dataset = getattr(loader, "dataset", None)
    found = []
    if isinstance(dataset, IterableDataset) and is_stateful(loader) and not is_stateful(dataset):
        found.append(f"{type(dataset).__name__} has no state_dict, and is read again from its beginning")
    for owner, _ in _parts([_sampler(loader), getattr(loader, "batch_sampler", None)]):
        if not isinstance(owner, _Unrestorable):
            continue
        found.append(f"{type(owner.owner).__name__}.{owner.name} is an iterator that is under way")
    return found


class FixedOrder:
    """A sampler that yields the same order however often it is asked in one epoch."""

    def __init__(self, sampler: Any) -> None:
        self.inner = sampler
        self.drawn_from: OrderState = {}
        self._at_start = capture_own([sampler])

    @classmethod
    def of(cls, loader: Any) -> FixedOrder:
        """The loader's own; it takes the place of the loader's sampler or batch sampler."""
        owner, name = loader, "sampler"
        if _has_own_batches(loader):
            name = "batch_sampler"
        elif loader.batch_sampler is not None:
            owner = loader.batch_sampler
        sampler = getattr(owner, name)
        if not isinstance(sampler, cls):
            sampler = vars(owner)[name] = cls(sampler)  # a DataLoader's own attributes cannot be set otherwise
        return sampler

    def own_state(self) -> OwnState:
        """What the next order is drawn from, without the global generators."""
        return only_changed(capture_own([self.inner]), self._at_start)

    def __iter__(self) -> Iterator[Any]:
        now = RandomState.capture()
        RandomState.from_state_dict(self.drawn_from["random"]).restore(devices=False)
        restore_own([self.inner], {**self._at_start, "generators": []})
        restore_own([self.inner], self.drawn_from["own"])
        drawn = list(self.inner)
        now.restore()
        return iter(drawn)

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        # `inner` while a copy is being made; a state of the sampler's own would be loaded in place of the position
        if name in ("inner", "state_dict", "load_state_dict"):
            raise AttributeError(name)
        return getattr(self.inner, name)


def capture_own(owners: list[Any]) -> OwnState:
    """Return the state of the generators and the plain attributes of loaders or samplers, without the global ones.

    Example:
        >>> import random
        >>> class Sampler:
        ...     def __init__(self):
        ...         self.rng, self.epoch = random.Random(0), 0
        >>> sampler = Sampler()
        >>> state = capture_own([sampler])
        >>> first, sampler.epoch = sampler.rng.random(), 1
        >>> restore_own([sampler], state)
        >>> first == sampler.rng.random(), sampler.epoch
        (True, 0)
    """
    generators, attributes = [], []
    for owner, plain in _parts(owners):
        if isinstance(owner, GENERATORS):
            generators.append(generator_state(owner))
        elif plain:
            attributes.append({name: _copied(value) for name, value in plain.items()})
    return {"generators": generators, "attributes": attributes}


def restore_own(owners: list[Any], state: OwnState) -> None:
    """Set what `capture_own` returned of objects of the same form."""
    generators, attributes = iter(state["generators"]), iter(state["attributes"])
    for owner, plain in list(_parts(owners)):
        if isinstance(owner, GENERATORS):
            saved = next(generators, None)
            if saved is not None:
                set_generator_state(owner, saved)
        elif plain:
            for name, value in next(attributes, {}).items():
                if name in plain:
                    setattr(owner, name, _copied(value))


def only_changed(state: OwnState, start: OwnState) -> OwnState:
    """Leave out attributes that are as they were at the start: a resumed run may be given others, a batch size say."""
    if len(state["attributes"]) != len(start["attributes"]):
        return {**state, "attributes": []}
    pairs = zip(state["attributes"], start["attributes"], strict=True)
    changed = [{name: v for name, v in now.items() if not _same(v, was.get(name))} for now, was in pairs]
    return {**state, "attributes": changed}


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, torch.Tensor) or isinstance(other, torch.Tensor):
        return type(value) is type(other) and value.shape == other.shape and torch.equal(value, other)
    return type(value) is type(other) and bool(value == other)


class _Unrestorable:
    """Stands for an attribute whose state cannot be read."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name


def _parts(owners: list[Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The generators, the samplers with their plain attributes, and what cannot be restored, in a fixed order.

    Yields:
        The object, and the plain attributes of one of the user's own samplers.
    """
    seen: set[int] = set()
    keep: list[Any] = []  # an id is another object's once its own is gone
    pending: deque[tuple[Any, int, bool]] = deque((owner, 0, True) for owner in owners)
    while pending:
        owner, depth, orders = pending.popleft()
        if owner is None or id(owner) in seen or depth > _MAX_DEPTH:
            continue
        seen.add(id(owner))
        keep.append(owner)
        if isinstance(owner, (*GENERATORS, _Unrestorable)):
            yield owner, {}
        elif isinstance(owner, (dict, list, tuple)):
            values = owner.values() if isinstance(owner, dict) else owner
            pending.extend((value, depth + 1, orders) for value in values if len(owner) <= _MAX_ITEMS)
        elif _is_loader(owner):
            names = ("generator", "sampler", "batch_sampler")
            pending.extend((getattr(owner, name, None), depth + 1, True) for name in names)
            pending.append((getattr(owner, "dataset", None), depth + 1, False))
        elif isinstance(owner, FixedOrder):
            pending.append((owner.inner, depth, True))
        elif _has(owner, "__dict__") and not _is_foreign(owner):
            attributes = vars(owner)
            if orders and not type(owner).__module__.startswith(_LIBRARIES):
                plain = {name: value for name, value in attributes.items() if _is_plain(value)}
                if plain:
                    yield owner, plain
                pending.extend(
                    (_Unrestorable(owner, n), depth, True) for n, v in attributes.items() if isinstance(v, _RUNNING)
                )
            for name, value in attributes.items():
                is_data = name in ("dataset", "data_source") and not _has(value, "_sampler")
                pending.append((value, depth + 1, orders and not is_data))
            pending.extend((generator, depth + 1, orders) for generator in _generators_by_name(owner))


def _generators_by_name(owner: Any) -> Iterator[Any]:
    """Generators that the methods of a user's class refer to as global names or from an enclosing function."""
    for cls in type(owner).__mro__:
        if cls.__module__.startswith((*_LIBRARIES, "builtins", "typing", "collections", "abc")):
            continue
        for method in vars(cls).values():
            function: Callable[..., Any] | None = getattr(method, "__func__", method)
            if not isinstance(function, types.FunctionType):
                continue
            values = [function.__globals__.get(name) for name in function.__code__.co_names]
            values += [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
            yield from (value for value in values if isinstance(value, GENERATORS))


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_plain(value: Any) -> bool:
    if isinstance(value, _PLAIN):
        return True
    if isinstance(value, torch.Tensor):
        return value.numel() <= _MAX_NUMBERS and not value.requires_grad
    if type(value) in (list, tuple):
        return len(value) <= _MAX_NUMBERS and all(isinstance(item, _PLAIN) for item in value)
    return False


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else list(value) if type(value) is list else value


def _is_loader(owner: Any) -> bool:
    return _has(owner, "dataset", "batch_sampler", "collate_fn")


def _has(owner: Any, *names: str) -> bool:
    """Whether it has these attributes; an object of the user's may raise whatever it likes when it is asked."""
    try:
        return all(hasattr(owner, name) for name in names)
    except Exception:
        return False


def _is_foreign(owner: Any) -> bool:
    """What samplers may refer to and that is no part of them."""
    return isinstance(
        owner, (torch.nn.Module, torch.Tensor, np.ndarray, type, types.ModuleType, types.FunctionType)
    ) or is_instance_by_name(owner, "Trainer", "LightningDataModule", "ThreadPoolExecutor", "Process")


def _sampler(loader: Any) -> Any:
    # Lightning puts its wrapper there and a placeholder into loader.sampler
    return getattr(getattr(loader, "batch_sampler", None), "sampler", getattr(loader, "sampler", None))


def _has_own_batches(loader: Any) -> bool:
    """Whether a batch sampler of the user's draws the order."""
    batches = getattr(loader, "batch_sampler", None)
    ours = isinstance(batches, FixedOrder)
    libraries = type(batches).__module__.startswith(("torch.", "torchdata."))
    # torchdata saves the state of an iterator: what a batch sampler itself offers is never asked for
    continues = is_stateful(batches) and not inspect.isgeneratorfunction(getattr(type(batches), "__iter__", None))
    return ours or (hasattr(batches, "__len__") and not libraries and not continues)
