"""From what the order of an epoch was drawn, in a form that a checkpoint holds, and the order drawn again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import RandomSampler

from lightning_stability import internals
from lightning_stability._compat import is_instance_by_name
from lightning_stability.checkpointing.dealing import distributed_order
from lightning_stability.checkpointing.samplers import FixedOrder, OwnState, capture_own, only_changed, restore_own
from lightning_stability.recovery.random_state import RandomState, generator_state, set_generator_state

Source = dict[str, Any]
"""What `describe` returns, with the states that the order is drawn from."""

_LIBRARIES = ("torch.", "torchdata.", "pytorch_lightning.", "lightning.", "lightning_fabric.")


class NotDealtOut(ValueError):
    """The samples of an epoch that are left cannot be dealt out anew; the message says why."""


class DrawState:
    """The states that one pass over a loader's samples is drawn from: the generators', and the sampler's own."""

    def __init__(self, loader: Any) -> None:
        self._owners = [_core(loader), getattr(loader, "generator", None)]
        if has_own_batches(loader):
            self._owners.append(internals.index_sampler(loader))
        self._at_start = capture_own(self._owners)

    def capture(self) -> tuple[RandomState, OwnState]:
        """The state of now."""
        own = only_changed(capture_own(self._owners), self._at_start)
        return RandomState.capture(torch.device("cpu")), own

    def restore(self, random: dict[str, Any], own: OwnState, attributes: bool = True) -> None:
        """Go to a state.

        Args:
            random: Of the generators, as plain numbers.
            own: What `capture` returned.
            attributes: Whether the sampler's attributes are set, too, and not its generators alone.
        """
        RandomState.from_state_dict(random).restore(devices=False)
        if attributes:
            restore_own(self._owners, {**self._at_start, "generators": []})
            restore_own(self._owners, own)
        else:
            restore_own(self._owners, {**own, "attributes": []})


def has_own_batches(loader: Any) -> bool:
    """Whether something else than torch's BatchSampler makes batches of samples."""
    index_sampler = internals.index_sampler(loader)
    return index_sampler is loader.batch_sampler and _name(index_sampler) not in (
        "BatchSampler",
        "torchdata.BatchSampler",
    )


def draws_as_it_likes(loader: Any) -> bool:
    """Whether a sampler of the user's, with a length, may draw random numbers while it is asked."""
    index_sampler = internals.index_sampler(loader)
    sampler = getattr(index_sampler, "sampler", index_sampler)
    owners = [owner for owner in (index_sampler, sampler) if not isinstance(owner, FixedOrder)]
    return hasattr(index_sampler, "__len__") and any(not type(o).__module__.startswith(_LIBRARIES) for o in owners)


def batch_size(loader: Any) -> int:
    """Samples in a batch; 1 if the loader makes no batches."""
    return int(getattr(internals.index_sampler(loader), "batch_size", 1) or 1)


def drops_last(loader: Any) -> bool:
    """Whether a last batch that is not full is left out."""
    return bool(getattr(internals.index_sampler(loader), "drop_last", False))


def describe(loader: Any, world_size: int) -> Source:
    """What is to be known of a loader's samplers where the order they draw has to be found in another run."""
    core = _core(loader)
    found: Source = {
        "sampler": _name(core),
        "samples": _length(getattr(loader, "dataset", None)),
        "batch_size": batch_size(loader),
        "own_batches": has_own_batches(loader),
        "world_size": world_size,
        "ranks": 1 if world_size == 1 else None,
        "distributed": None,
        "drawn_from": None,
    }
    if type(core) is RandomSampler:
        found["random_sampler"] = {
            "samples": len(core.data_source),
            "replacement": core.replacement,
            "num_samples": core.num_samples,
            "generator": None if core.generator is None else generator_state(core.generator),
        }
    outer = _sampler(loader)
    if isinstance(outer, FixedOrder):
        found["drawn_from"], outer = outer.drawn_from or None, outer.inner
    if is_instance_by_name(outer, "DistributedSampler"):
        names = ("shuffle", "seed", "epoch", "drop_last")
        found["ranks"] = outer.num_replicas
        found["distributed"] = {"samples": _length(outer.dataset), **{name: getattr(outer, name) for name in names}}
    return found


def whole_order(source: Source, loader: Any) -> list[Any]:
    """All samples of the epoch in the order in which the ranks took them, drawn again.

    Args:
        loader: The loader of now, for samplers that cannot be made again without it.

    Raises:
        NotDealtOut: If it cannot be drawn here.
    """
    if source["own_batches"] or has_own_batches(loader):
        raise NotDealtOut("a batch sampler of its own makes the batches")
    if source["ranks"] is None:
        raise NotDealtOut(f"{source['sampler']} deals samples out among ranks by itself, or not at all")
    dataset = getattr(loader, "dataset", None)
    if source["samples"] != _length(dataset):
        raise NotDealtOut(f"the data had {source['samples']} samples and has {_length(dataset)}")
    dealt = source["distributed"]
    if dealt is None:
        return _own_order(source, loader)
    positions = distributed_order(ranks=source["ranks"], **dealt)
    if source["sampler"] == "DistributedSampler":
        return positions
    order = _own_order(source, loader)
    if source["drawn_from"] is None:
        raise NotDealtOut(f"each rank's {source['sampler']} drew an order of its own")
    return [order[position] for position in positions]


def _own_order(source: Source, loader: Any) -> list[Any]:
    """What one sampler draws for all ranks. The global generators are as before."""
    now, core = RandomState.capture(torch.device("cpu")), _core(loader)
    try:
        if source["sampler"] == "SequentialSampler":
            return list(range(source["samples"]))
        if source["sampler"] == "RandomSampler":
            return list(_random_sampler(source))
        if _name(core) != source["sampler"]:
            raise NotDealtOut(f"the sampler was a {source['sampler']} and is a {_name(core)}")
        if source["drawn_from"] is not None:
            fixed = FixedOrder(core)
            fixed.drawn_from = source["drawn_from"]
            return list(fixed)
        state = DrawState(loader)
        state.restore(source["random"], source["own"])
        samples = iter(core)
        if source["first_random"] is not None:
            state.restore(source["first_random"], source["first_own"], attributes=False)
        return list(itertools.islice(samples, len(core)))
    finally:
        now.restore(devices=False)


def _random_sampler(source: Source) -> Iterator[int]:
    """Torch's own, which Lightning takes out where there are several ranks."""
    if source["first_random"] is None:
        raise NotDealtOut("its order was not drawn yet")
    RandomState.from_state_dict(source["first_random"]).restore(devices=False)
    options, generator = source["random_sampler"], None
    if options["generator"] is not None:
        generator = torch.Generator()
        set_generator_state(generator, options["generator"])
    sampler = RandomSampler(range(options["samples"]), options["replacement"], options["num_samples"], generator)
    return iter(sampler)


def _core(loader: Any) -> Any:
    """The sampler that draws, below what deals out among ranks."""
    sampler = _sampler(loader)
    sampler = sampler.inner if isinstance(sampler, FixedOrder) else sampler
    if is_instance_by_name(sampler, "DistributedSamplerWrapper"):
        sampler = internals.wrapped_sampler(sampler)
    return sampler


def _sampler(loader: Any) -> Any:
    batches = getattr(loader, "batch_sampler", None)
    return getattr(batches, "sampler", batches if batches is not None else getattr(loader, "sampler", None))


def _name(sampler: Any) -> str:
    kind, _, _ = type(sampler).__module__.partition(".")
    name = type(sampler).__name__
    return name if kind == "torch" else f"{kind}.{name}"


def _length(data: Any) -> int | None:
    return len(data) if hasattr(data, "__len__") else None
