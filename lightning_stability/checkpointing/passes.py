"""Where each training loader is in its data, and how another one gets there without loading what lies before.

A pass is one way through a loader's samples. Its order is drawn from the state of the generators, and of the sampler,
when the sampler is iterated over and when it is first asked. These are noted. A resumed run goes back to them, draws
the same order, and leaves out in the sampler what was trained.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from tqdm import tqdm

from lightning_stability import internals
from lightning_stability.checkpointing import orders
from lightning_stability.checkpointing.loader_hooks import LoaderListener
from lightning_stability.checkpointing.samplers import is_stateful
from lightning_stability.recovery.random_state import RandomState

Position = dict[str, Any]
"""Where a loader is: the batches it has delivered in a pass, and from what their order was drawn."""

_SHOW_PROGRESS_AFTER = 1  # second
_CHUNK = 100_000
_MAX_COMPARED = 64
_END = object()


class Passes(LoaderListener):
    """Follows the training loaders of one Trainer."""

    def __init__(self) -> None:
        self._followed: weakref.WeakKeyDictionary[Any, _Followed] = weakref.WeakKeyDictionary()
        self._by_iterator: weakref.WeakKeyDictionary[Any, _Followed] = weakref.WeakKeyDictionary()
        self._held = False

    def follow(self, loaders: list[Any], world_size: int) -> None:
        """Follow new loaders; before they are iterated over."""
        for loader in loaders:
            if isinstance(loader, DataLoader) and loader not in self._followed:
                self._followed[loader] = _Followed(loader, world_size)

    def hold(self) -> None:
        """Have iterating over these loaders yield nothing, until it is known where they have to begin."""
        self._held = True

    def release(self) -> bool:
        """Have iterating over them yield their data again; whether it did not."""
        held, self._held = self._held, False
        return held

    def holds(self, loader: Any) -> bool:
        """Whether it yields nothing for now."""
        return self._held and loader in self._followed

    def positions(self, loaders: list[Any]) -> list[Position | None]:
        """Where loaders are; None for those of which it is not known."""
        followed = [self._followed.get(loader) for loader in loaders]
        return [None if one is None else one.position() for one in followed]

    def begin_at(self, loader: Any, start: Start) -> None:
        """Have a loader begin somewhere else when it is next iterated over."""
        if loader in self._followed:
            self._followed[loader].next = start

    def use_base_seed(self, loader: Any, seed: int) -> None:
        """Seed the workers of a loader as they were, when they are next started."""
        if loader in self._followed:
            self._followed[loader].base_seed = seed

    def forget(self) -> None:
        """Begin everything as if nothing had been resumed."""
        self.release()
        for followed in self._followed.values():
            followed.next = followed.base_seed = None

    def on_begin(self, iterator: Any, loader: Any, is_made: bool) -> None:
        """A pass is about to begin."""
        followed = self._followed.get(loader)
        if followed is not None and (not is_made or loader.num_workers == 0):
            followed.begin()

    def on_begun(self, iterator: Any, loader: Any, is_made: bool) -> None:
        """A pass has begun."""
        followed = self._followed.get(loader)
        if followed is None:
            return
        if is_made and followed.base_seed is not None:
            internals.set_base_seed(iterator, followed.base_seed)
            followed.base_seed = None
        if not is_made or loader.num_workers == 0:
            self._by_iterator[iterator] = followed
            followed.begun(iterator)

    def on_ask(self, iterator: Any) -> None:
        """A loader asks its sampler."""
        followed = self._by_iterator.get(iterator)
        if followed is not None:
            followed.ask(iterator)

    def on_index(self, iterator: Any, index: Any) -> None:
        """A sampler has answered."""
        followed = self._by_iterator.get(iterator)
        if followed is not None:
            followed.given.append(index)
            followed.asked += 1


@dataclass
class Start:
    """Where a pass begins."""

    position: Position
    how: Literal["skip", "load", "own state"] = "skip"
    """Batches that are over are left out in the sampler, or will be loaded, or the loader knows by itself."""
    rest: Iterable[Any] | None = None
    """The indices of the batches that are left, where they are others than the sampler gives."""


class _Followed:
    """One loader, and the pass under way."""

    def __init__(self, loader: Any, world_size: int) -> None:
        self._loader = weakref.ref(loader)
        self._world_size = world_size
        self._draws = orders.DrawState(loader)
        ahead = (loader.prefetch_factor or 0) * loader.num_workers
        self.given: deque[Any] = deque(maxlen=ahead + 2)
        """Indices of the last batches that were asked for."""
        self.asked = 0
        self.next: Start | None = None
        self.base_seed: int | None = None
        self._iterator: weakref.ref[Any] | None = None
        self._source: orders.Source | None = None
        self._dealt: dict[str, Any] | None = None
        self._skipped = 0
        self._is_first = False

    def position(self) -> Position | None:
        iterator = None if self._iterator is None else self._iterator()
        if self._source is None or iterator is None:
            return None
        batches = self._skipped + internals.batches_delivered(iterator)
        back = self.asked - batches
        return {
            "batches": batches,
            "last": _to_compare(self.given[-1 - back]) if batches and 0 <= back < len(self.given) else None,
            "base_seed": internals.base_seed(iterator),
            "source": {k: v.state_dict() if isinstance(v, RandomState) else v for k, v in self._source.items()},
            "dealt": self._dealt,
        }

    def begin(self) -> None:
        if self.next is None or self.next.how == "own state":
            random, own = self._draws.capture()
            self._source = {"random": random, "own": own, "first_random": None, "first_own": None}
        else:
            self._source = self.next.position["source"]
            self._draws.restore(self._source["random"], self._source["own"])

    def begun(self, iterator: Any) -> None:
        start, self.next = self.next, None
        self._iterator = weakref.ref(iterator)
        self.given.clear()
        self.asked = self._skipped = 0
        self._is_first, self._dealt = True, None
        if start is None:
            return
        self._source = start.position["source"]
        if start.how == "own state":
            self._is_first = False
        elif start.how == "skip":
            self._skip(iterator, start)

    def _skip(self, iterator: Any, start: Start) -> None:
        self._dealt = start.position["dealt"]
        self._skipped = self.asked = start.position["batches"]
        if start.position["last"] is not None:
            self.given.append(start.position["last"])
        if start.rest is not None:
            internals.set_sampler_iterator(iterator, iter(start.rest))
        elif self._source is not None and self._source["first_random"] is not None:
            self._restore_first()
            internals.set_sampler_iterator(iterator, self._rest(iterator, start.position))
        else:
            return  # nothing was asked: it begins with its first batch
        self._is_first = False

    def ask(self, iterator: Any) -> None:
        loader: Any = self._loader()
        if self._is_first and self._source is not None:
            self._is_first = False
            if self._source["first_random"] is None:
                self._source["first_random"], self._source["first_own"] = self._draws.capture()
                self._source.update(orders.describe(loader, self._world_size))
            else:
                self._restore_first()
            if orders.draws_as_it_likes(loader) and not is_stateful(loader):  # else its state says how far it was asked
                internals.set_sampler_iterator(iterator, _drawn_at_once(iterator, loader))
        if self._skipped and self.asked == self._skipped and loader.num_workers > 0:
            internals.turn_workers(iterator, self._skipped)

    def _restore_first(self) -> None:
        assert self._source is not None
        self._draws.restore(self._source["first_random"], self._source["first_own"], attributes=False)

    def _rest(self, iterator: Any, position: Position) -> Iterator[Any]:
        """What the sampler gives after the batches of a position."""
        loader, batches = self._loader(), position["batches"]
        sampler = internals.index_sampler(loader)
        if batches == 0:
            return iter(internals.sampler_iterator(iterator))
        if orders.draws_as_it_likes(loader):
            rest = _left_out(_drawn_at_once(iterator, loader), batches - 1)
        elif type(sampler) is BatchSampler:
            samples = _samples_after(sampler.sampler, (batches - 1) * sampler.batch_size)
            rest = iter(BatchSampler(samples, sampler.batch_size, sampler.drop_last))
        else:
            rest = _left_out(internals.sampler_iterator(iterator), batches - 1)
        last = next(rest, _END)
        if last is _END or (position["last"] is not None and _to_compare(last) != position["last"]):
            raise ValueError(f"{type(sampler).__name__} gives another order than it gave there")
        return rest


def left_out_by_loading(iterator: Iterator[Any], batches: int) -> None:
    """Load batches and drop them, with a progress bar."""
    for _ in tqdm(range(batches), desc="Loading batches that were trained", delay=_SHOW_PROGRESS_AFTER, leave=False):
        next(iterator)


def _drawn_at_once(iterator: Any, loader: Any) -> Iterator[Any]:
    """What a sampler gives in an epoch, asked for in one go: if it drew as training goes, it could not do so again."""
    given = internals.sampler_iterator(iterator)
    return itertools.chain(list(itertools.islice(given, len(internals.index_sampler(loader)))), given)


def _samples_after(sampler: Any, count: int) -> Iterator[Any]:
    """What a sampler gives after so many samples; of torch's own two, only these are made."""
    if type(sampler) is SequentialSampler:
        return iter(range(count, len(sampler)))
    whole = type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == len(sampler.data_source)
    if not whole:
        return _left_out(iter(sampler), count)
    generator = sampler.generator
    if generator is None:
        generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
    return iter(torch.randperm(len(sampler), generator=generator)[count:].tolist())


def _left_out(given: Iterator[Any], count: int) -> Iterator[Any]:
    """Go on after so many of what an iterator gives, with a progress bar if it takes long."""
    with tqdm(desc="Skipping indices", total=count, delay=_SHOW_PROGRESS_AFTER, leave=False) as bar:
        for first in range(0, count, _CHUNK):
            chunk = min(_CHUNK, count - first)
            next(itertools.islice(given, chunk, chunk), None)
            bar.update(chunk)
    return given


def _to_compare(index: Any) -> list[int] | None:
    """The first numbers of a batch's indices; None if they are none."""
    items = index[:_MAX_COMPARED] if isinstance(index, (list, tuple)) else [index]
    try:
        return [operator.index(item) for item in items]
    except TypeError:
        return None
