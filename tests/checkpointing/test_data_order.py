"""Wherever a run is killed inside an epoch, and whoever continues it: each sample of the epoch is trained once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_stability.checkpointing import elastic
from lightning_stability.checkpointing.dealing import batch_sizes
from lightning_stability.checkpointing.passes import Passes, Position, Start


class Numbers(Dataset[int]):
    def __init__(self, count: int) -> None:
        self.count, self.loaded = count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        self.loaded += 1
        return index


class Ranks:
    """The training loaders of all ranks, as Lightning makes them: with a DistributedSampler if there are several."""

    def __init__(self, samples: int, ranks: int, batch_size: int, drop_last: bool, shuffle: bool, workers: int) -> None:
        data, options = Numbers(samples), {"batch_size": batch_size, "drop_last": drop_last, "num_workers": workers}
        self.passes = Passes()
        self.passes.start()
        if ranks == 1:
            self.loaders = [DataLoader(data, shuffle=shuffle, **options)]
        else:
            samplers = [DistributedSampler(data, ranks, rank, shuffle, seed=3) for rank in range(ranks)]
            for sampler in samplers:
                sampler.set_epoch(2)
            self.loaders = [DataLoader(data, sampler=sampler, **options) for sampler in samplers]
        self.passes.follow(self.loaders, ranks)

    def begin(self, positions: list[Position] | None = None) -> None:
        ranks = len(self.loaders)
        for rank, loader in enumerate(self.loaders):
            if positions is None:
                continue
            if elastic.is_dealt_otherwise(positions[0], loader, ranks):
                start, _ = elastic.dealt_anew({**positions[0], "limit": None}, loader, rank, ranks)
            elif positions[rank]["dealt"] is not None:
                start = elastic.dealt_before(positions[rank], loader, rank)
            else:
                start = Start(positions[rank])
            self.passes.begin_at(loader, start)
        self.iterators = [iter(loader) for loader in self.loaders]

    def train(self, batches: int | None = None) -> list[list[list[int]]]:
        """So many batches on each rank; by default all that are left."""
        seen: list[list[list[int]]] = [[] for _ in self.loaders]
        while batches is None or len(seen[0]) < batches:
            found = [next(iterator, None) for iterator in self.iterators]
            if all(batch is None for batch in found):
                break
            assert all(batch is not None for batch in found), "all ranks have as many batches"
            for rank, batch in enumerate(found):
                seen[rank].append(batch.tolist())
        return seen

    def positions(self) -> list[Position]:
        found = self.passes.positions(self.loaders)
        assert all(found)
        self.iterators = []
        return found  # type: ignore[return-value]

    def stop(self) -> None:
        self.passes.stop()


def flat(seen: list[list[list[int]]]) -> list[int]:
    return [index for rank in seen for batch in rank for index in batch]


shapes = st.tuples(st.integers(1, 4), st.integers(1, 5))  # ranks, batch size
some_workers = st.sampled_from([0] * 24 + [2])  # a process takes its time


@settings(max_examples=100, deadline=None)
@given(
    samples=st.integers(1, 60),
    shape=shapes,
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    workers=st.tuples(some_workers, some_workers),
    later=st.lists(shapes, min_size=1, max_size=3),
    data=st.data(),
)
def test_every_sample_is_trained_once_whoever_continues(
    samples: int, shape: Any, drop_last: bool, shuffle: bool, workers: Any, later: list[Any], data: st.DataObject
) -> None:
    torch.manual_seed(samples)
    seen: list[int] = []
    positions = None
    shapes_in_turn = [shape, *later]
    for number, (ranks, batch_size) in enumerate(shapes_in_turn):
        run = Ranks(samples, ranks, batch_size, drop_last, shuffle, workers[number % 2])
        run.begin(positions)
        is_last = number == len(later)
        found = flat(run.train(None if is_last else data.draw(st.integers(1, 6))))
        seen += found
        if is_last or not found:
            run.stop()
            break
        positions = run.positions()
        run.stop()
        assert len(set(seen)) in (len(seen), samples), "before the last step, none is trained twice"
    trained = len(set(seen))
    assert len(seen) - trained < max(ranks for ranks, _ in shapes_in_turn), (
        "a last step that has fewer samples than ranks repeats some"
    )
    assert trained == samples or drop_last
    assert samples - trained < max(ranks * batch_size for ranks, batch_size in shapes_in_turn)


@settings(max_examples=100, deadline=None)
@given(
    samples=st.integers(1, 60),
    shape=shapes,
    first=shapes,
    drop_last=st.booleans(),
    workers=some_workers,
    kills=st.lists(st.integers(1, 4), max_size=3),
    anew=st.booleans(),
)
def test_with_the_same_ranks_the_order_is_the_same(
    samples: int, shape: Any, first: Any, drop_last: bool, workers: int, kills: list[int], anew: bool
) -> None:
    positions = None
    if anew:  # the rest of an epoch that others began
        torch.manual_seed(1)
        run = Ranks(samples, *first, drop_last, True, 0)
        run.begin()
        if not flat(run.train(1)):
            run.stop()
            return
        positions = run.positions()
        run.stop()
    found = []
    for cuts in ([], kills):
        torch.manual_seed(2)
        at, seen = positions, [[] for _ in range(shape[0])]
        for cut in [*cuts, None]:
            run = Ranks(samples, *shape, drop_last, True, workers)
            run.begin(at)
            more = run.train(cut)
            seen = [a + b for a, b in zip(seen, more, strict=True)]
            if cut is None or not more[0]:
                run.stop()
                break
            at = run.positions()
            run.stop()
            torch.manual_seed(99)
        found.append(seen)
    assert found[0] == found[1]


@given(st.integers(0, 200), st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_batches_are_dealt_out_evenly(samples: int, ranks: int, batch_size: int, drop_last: bool) -> None:
    sizes = batch_sizes(samples, ranks, batch_size, drop_last)
    assert len(sizes) % ranks == 0
    assert all(0 < size <= batch_size for size in sizes)
    if drop_last:
        assert 0 <= samples - sum(sizes) < ranks * batch_size
    else:
        assert 0 <= sum(sizes) - samples < ranks
        assert samples >= 2 * ranks or sum(sizes) - samples == 0 or batch_size == 1 or samples < ranks


class Lazy(Sampler[int]):
    """Draws from global generators each time it is asked."""

    def __len__(self) -> int:
        return 23

    def __iter__(self) -> Iterator[int]:
        for _ in range(23):
            yield random.randrange(23) if torch.rand(()) < 0.5 else int(torch.randint(23, ()))


SAMPLERS: dict[str, Any] = {
    "weighted": lambda: {"sampler": WeightedRandomSampler([1.0, 2.0] * 11 + [1.0], 23)},
    "with replacement": lambda: {"sampler": RandomSampler(range(23), replacement=True)},
    "a generator of its own": lambda: {"shuffle": True, "generator": torch.Generator().manual_seed(5)},
    "the user's, drawn as it goes": lambda: {"sampler": Lazy()},
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("batch_size", [4, None])
def test_samplers_of_all_kinds_go_on_where_they_were(name: str, batch_size: int | None) -> None:
    def made() -> tuple[Passes, Any]:
        passes, loader = Passes(), DataLoader(Numbers(23), batch_size=batch_size, **SAMPLERS[name]())
        passes.start()
        passes.follow([loader], 1)
        return passes, loader

    torch.manual_seed(0)
    random.seed(0)
    passes, loader = made()
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
        torch.rand(1)  # as dropout draws
    [position] = passes.positions([loader])
    rest = [batch.tolist() if batch_size else batch for batch in iterator]
    passes.stop()
    assert position is not None
    passes, loader = made()
    passes.begin_at(loader, Start(position))
    assert [batch.tolist() if batch_size else batch for batch in loader] == rest
    passes.stop()


def test_another_order_than_the_one_before_is_found_out() -> None:
    class Changed(Numbers):
        def __len__(self) -> int:
            return 24

    positions = []
    for data in (Numbers(23), Changed(23)):
        torch.manual_seed(0)
        passes, loader = Passes(), DataLoader(data, batch_size=4, shuffle=True)
        passes.start()
        passes.follow([loader], 1)
        if positions:
            passes.begin_at(loader, Start(positions[0]))
            with pytest.raises(ValueError, match="another order"):
                iter(loader)
        else:
            iterator = iter(loader)
            next(iterator)
            positions += passes.positions([loader])
        passes.stop()


@pytest.mark.parametrize("workers", [0, 2])
def test_near_the_end_of_a_million_samples_none_is_loaded_that_is_not_trained(workers: int) -> None:
    count, batch_size, left = 1_000_000, 4, 3
    torch.manual_seed(0)
    passes, loader = Passes(), DataLoader(Numbers(count), batch_size=batch_size, shuffle=True)
    passes.start()
    passes.follow([loader], 1)
    iterator = iter(loader)
    next(iterator)
    [position] = passes.positions([loader])
    passes.stop()
    assert position is not None
    position.update(batches=count // batch_size - left, last=None)
    loaded = torch.zeros(1, dtype=torch.int64).share_memory_()

    class Counted(Numbers):
        def __getitem__(self, index: int) -> int:
            loaded.add_(1)
            return index

    passes, loader = Passes(), DataLoader(Counted(count), batch_size=batch_size, shuffle=True, num_workers=workers)
    passes.start()
    passes.follow([loader], 1)
    passes.begin_at(loader, Start(position))
    assert len(list(loader)) == left
    assert loaded.item() == left * batch_size
    passes.stop()
