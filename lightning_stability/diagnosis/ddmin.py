"""Delta debugging: the smallest part of a set that is still enough.

Source: `ddmin`, Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input" (2002).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def ddmin(items: Sequence[T], is_enough: Callable[[list[T]], bool]) -> list[T]:
    """A part of a set that is enough, of which no single item can be left out.

    Args:
        items: The set, which is enough.
        is_enough: Whether a part of it, in its order, is. It is asked once for each part.

    Returns:
        The part; empty if nothing is needed.

    Example:
        >>> ddmin(range(8), lambda part: {2, 5} <= set(part))
        [2, 5]
    """
    known: dict[tuple[int, ...], bool] = {}

    def is_such(part: list[int]) -> bool:
        key = tuple(part)
        if key not in known:
            known[key] = is_enough([items[index] for index in part])
        return known[key]

    needed, parts = list(range(len(items))), 2
    if is_such([]):
        return []
    while len(needed) > 1:
        chunks = _split(needed, parts)
        rests = [[index for index in needed if index not in chunk] for chunk in map(set, chunks)]
        smaller = next((part for part in chunks if is_such(part)), None)
        if smaller is not None:
            needed, parts = smaller, 2
            continue
        smaller = next((part for part in rests if is_such(part)), None) if parts > 2 else None
        if smaller is not None:
            needed, parts = smaller, parts - 1
        elif parts == len(needed):
            break
        else:
            parts = min(2 * parts, len(needed))
    return [items[index] for index in needed]


def _split(items: list[int], parts: int) -> list[list[int]]:
    edges = [round(i * len(items) / parts) for i in range(parts + 1)]
    return [items[a:b] for a, b in itertools.pairwise(edges)]
