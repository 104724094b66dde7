"""The indices that are told for a batch are those that its samples came from, and asking changes nothing."""

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_stability.checkpointing.sample_indices import SampleIndices


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("cls", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("workers", [0, 2])
def test_they_are_those_of_the_batch_in_every_epoch(cls: Any, workers: int) -> None:
    listening = SampleIndices()
    listening.start()
    try:
        loader = cls(Numbers(), batch_size=3, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
        for batches in (4, 2, 4):  # the second epoch is left in the middle, with batches asked ahead
            iterator = iter(loader)
            for _ in range(batches):
                assert next(iterator).tolist() == listening.take(iterator)
    finally:
        listening.stop()


def test_listening_changes_neither_the_order_nor_the_state_of_a_loader() -> None:
    found = []
    for listen in (False, True):
        listening = SampleIndices()
        if listen:
            listening.start()
        torch.manual_seed(0)
        loader = StatefulDataLoader(Numbers(), batch_size=3, shuffle=True)
        iterator = iter(loader)
        first = next(iterator).tolist()
        state = loader.state_dict()
        resumed = StatefulDataLoader(Numbers(), batch_size=3, shuffle=True)
        resumed.load_state_dict(state)
        found.append((first, repr(state), [batch.tolist() for batch in resumed], torch.get_rng_state().tolist()))
        listening.stop()
    assert found[0] == found[1]


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(6))


def test_nothing_is_said_where_there_are_no_indices() -> None:
    listening = SampleIndices()
    listening.start()
    for loader in (DataLoader(Stream(), batch_size=2), DataLoader(Numbers(), batch_size=None)):
        iterator = iter(loader)
        next(iterator)
        assert listening.take(iterator) is None
    assert listening.take(None) is None
    listening.stop()


def test_torch_is_as_it_was_once_the_last_one_has_stopped() -> None:
    before = _BaseDataLoaderIter._next_index
    first, second = SampleIndices(), SampleIndices()
    for listening in (first, second, second):
        listening.start()
    first.stop()
    assert _BaseDataLoaderIter._next_index is not before
    second.stop()
    second.stop()
    assert _BaseDataLoaderIter._next_index is before


def test_each_of_two_listeners_takes_every_batch() -> None:
    first, second = SampleIndices(), SampleIndices()
    for listening in (first, second):
        listening.start()
    iterator = iter(DataLoader(Numbers(), batch_size=2))
    next(iterator)
    assert first.take(iterator) == second.take(iterator) == [0, 1]
    for listening in (first, second):
        listening.stop()
