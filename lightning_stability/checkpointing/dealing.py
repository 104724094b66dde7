"""How the samples of an epoch are dealt out among ranks and batches: plain arithmetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch


def distributed_order(samples: int, ranks: int, shuffle: bool, seed: int, epoch: int, drop_last: bool) -> list[int]:
    """The positions that torch's DistributedSampler deals out among ranks in turn, without those it repeats."""
    if shuffle:
        order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    else:
        order = list(range(samples))
    return order[: samples // ranks * ranks] if drop_last and samples >= ranks else order


def batch_sizes(samples: int, ranks: int, batch_size: int, drop_last: bool) -> list[int]:
    """Into which batches samples are dealt so that each is trained on once and all ranks have as many batches.

    Returns:
        The sizes, step by step, in a step rank by rank. Only the last steps have smaller batches. The sum is more than
        `samples` where a last step has fewer samples than there are ranks, and its neighbour none to spare.

    Example:
        >>> batch_sizes(11, ranks=2, batch_size=2, drop_last=False)
        [2, 2, 2, 2, 2, 1]
        >>> batch_sizes(9, ranks=2, batch_size=2, drop_last=False)
        [2, 2, 2, 1, 1, 1]
        >>> batch_sizes(9, ranks=2, batch_size=2, drop_last=True)
        [2, 2, 2, 2]
    """
    steps, tail = divmod(samples, ranks * batch_size)
    sizes = [batch_size] * (steps * ranks)
    if tail == 0 or drop_last:
        return sizes
    if tail >= ranks:
        return sizes + _spread(tail, ranks)
    if steps and batch_size > 1:
        return sizes[:-ranks] + _spread(tail + ranks * batch_size, 2 * ranks)
    return sizes + [1] * ranks


def _spread(samples: int, batches: int) -> list[int]:
    size, larger = divmod(samples, batches)
    return [size + 1] * larger + [size] * (batches - larger)


def share(order: Sequence[Any], sizes: list[int], ranks: int, rank: int, skip: int = 0) -> list[list[Any]]:
    """The batches of one rank.

    Args:
        sizes: What `batch_sizes` returned for so many.
        skip: How many of them are left out.
    """
    ends = list(itertools.accumulate(sizes, initial=0))
    if ends[-1] > len(order):  # the first ones once more, so that the last step has one for each rank
        order = list(order) * math.ceil(ends[-1] / max(len(order), 1))
    firsts = range(skip * ranks + rank, len(sizes), ranks)
    return [list(order[ends[i] : ends[i + 1]]) for i in firsts]


def trained(samples: int, sizes: list[int], ranks: int, batches: int) -> int:
    """How many samples, from the first one on, are trained when each rank has had so many batches."""
    return min(samples, sum(sizes[: batches * ranks]))
