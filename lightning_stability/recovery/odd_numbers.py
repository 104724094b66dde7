"""Single numbers of weights or of an optimizer's state that left all others far behind, as after a flipped bit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST = 4
"""More of a kind at once, such as weights, are no flipped bit: then the training itself went wrong."""
TIMES_LARGEST, TIMES_MOVES = 4.0, 100.0
"""A number is odd if it has moved by more than so many times the largest of its tensor, and so many times as far as the
others have moved on average."""
OF_STATE = 64.0
"""In place of the 4, for what an optimizer keeps: one bad batch that is trained can move that far, but no weight."""
FEWEST = 32
"""A tensor with fewer numbers has too few to compare with."""


@dataclass(frozen=True)
class OddNumber:
    """A number that was restored.

    Attributes:
        parameter: The parameter that it belongs to.
        index: Its place there; of a sharded parameter in this rank's part.
        what: `"weight"`, or the name of the optimizer's state, such as `"exp_avg"`.
        was: What it had become.
        restored: What it is again.
    """

    parameter: str
    index: tuple[int, ...]
    what: str
    was: float
    restored: float


@torch.no_grad()
def restore_odd_numbers(trained: dict[str, Any], kept: dict[str, Any], names: Mapping[Any, str]) -> list[OddNumber]:
    """Restore single numbers that left all others far behind, each with all of its parameter's state at that place.

    Args:
        trained: What optimizers write, as it is now (`RunState.trained`).
        kept: A copy of it from some steps ago.

    Returns:
        The numbers that were odd, of each kind of which there were no more than `MOST`.
    """
    pairs = _pairs(trained, kept, names)
    looks = [(name, what, *_look(what, now, then)) for name, of in pairs.items() for what, now, then in of]
    found: list[tuple[str, str, int]] = []
    for name, what, places, odd in looks:
        if odd is not None:
            found += [(name, what, place) for place, flag in zip(places.tolist(), odd.tolist(), strict=True) if flag]
    # (large gradients, which a wrong weight brings about, make many second moments odd)
    of_kind = Counter(what for _, what, _ in found)
    found = [odd for odd in found if of_kind[odd[1]] <= MOST]
    restored = []
    for name, what, place in found:
        now, then = next((now, then) for key, now, then in pairs[name] if key == what)
        index = _unravel(place, now.shape)
        restored.append(OddNumber(name, index, what, float(now[index]), float(then[index])))
    for name, _, place in found:
        for _, now, then in pairs[name]:
            index = _unravel(place, now.shape)
            now[index] = then[index].to(now.device)
    return restored


def _pairs(
    trained: dict[str, Any], kept: dict[str, Any], names: Mapping[Any, str]
) -> dict[str, list[tuple[str, Tensor, Tensor]]]:
    """By parameter: its weight, and what the optimizer keeps of each of its numbers, now and then."""
    pairs = {
        name: [("weight", weight, kept["weights"][name])]
        for name, weight in trained["weights"].items()
        if weight.is_floating_point() and weight.numel() >= FEWEST and name in kept["weights"]
    }
    for states, kept_states in zip(trained["states"], kept["states"], strict=True):
        for parameter, values in states.items():
            name, then = names.get(parameter, ""), kept_states.get(parameter)
            if name not in pairs or not isinstance(values, dict) or not isinstance(then, dict):
                continue
            shape = pairs[name][0][1].shape
            pairs[name] += [
                (key, value, then[key])
                for key, value in values.items()
                if isinstance(value, Tensor)
                and value.shape == shape
                and value.is_floating_point()
                and isinstance(then.get(key), Tensor)
            ]
    return pairs


def _look(what: str, now: Tensor, then: Tensor) -> tuple[Tensor, Tensor | None]:
    """Places of the numbers that have moved furthest, and which of them are odd."""
    then = then.to(now.device).reshape(-1).double()
    moved = (now.reshape(-1).double() - then).abs_()
    furthest = moved.topk(MOST + 1)
    usual = moved.index_fill(0, furthest.indices, 0.0).mean()
    largest = then.abs_().amax()
    times_largest = TIMES_LARGEST if what == "weight" else OF_STATE
    limit = torch.maximum(times_largest * largest, TIMES_MOVES * usual)
    return furthest.indices, (furthest.values > limit) & (largest > 0.0)


def _unravel(place: int, shape: torch.Size) -> tuple[int, ...]:
    index = []
    for position, size in enumerate(shape):
        rest = math.prod(shape[position + 1 :])
        index.append(place // rest % size)
    return tuple(index)
