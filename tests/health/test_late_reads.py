"""Rows of numbers on their way to the host: all of them, in order, as many at a time as wished."""

import pytest
import torch

from lightning_stability.health import LateReads

Seen = list[list[list[float]]]


def send(reads: LateReads, seen: Seen, *values: list[float]) -> None:
    reads.send([torch.tensor(part) for part in values], lambda arrays: seen.append([a.tolist() for a in arrays]))


def test_rows_are_handed_over_once_there_are_enough() -> None:
    reads, seen = LateReads(every=3), []
    for step in range(7):
        send(reads, seen, [float(step), 1.0], [2.0])
        reads.poll()
        assert len(seen) == (step + 1) // 3 * 3
    assert len(reads) == 1
    reads.drain()
    assert seen == [[[float(step), 1.0], [2.0]] for step in range(7)]


def test_numbers_that_are_there_already_wait_for_their_turn() -> None:
    reads, seen = LateReads(every=2), []
    send(reads, seen, [1.0])
    reads.hold([torch.tensor([2.0]).numpy()], lambda arrays: seen.append([a.tolist() for a in arrays]))
    reads.poll()
    assert seen == [[[1.0]], [[2.0]]]


def test_a_reader_may_ask_for_everything_while_it_is_handed_something() -> None:
    """A checkpoint that is written in answer to a record asks for the rest of them."""
    reads, seen = LateReads(every=4), []
    for step in range(4):
        reads.send([torch.tensor([float(step)])], lambda arrays: (seen.append(arrays[0].item()), reads.drain()))
    reads.poll()
    assert seen == [0.0, 1.0, 2.0, 3.0]


def test_what_was_dropped_is_not_handed_over() -> None:
    reads, seen = LateReads(), []
    send(reads, seen, [1.0])
    reads.drop()
    reads.drain()
    assert seen == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_of_their_own_become_a_vector(dtype: torch.dtype) -> None:
    reads, seen = LateReads(), []
    numbers = [torch.tensor(float(i), dtype=dtype) for i in range(5)]
    reads.send([numbers, [torch.tensor(7.0)]], lambda arrays: seen.append([a.tolist() for a in arrays]))
    reads.poll()
    assert seen == [[[0.0, 1.0, 2.0, 3.0, 4.0], [7.0]]]
