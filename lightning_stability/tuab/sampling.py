"""As many windows of each class in an epoch, however many recordings there are of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler


class BalancedSampler(Sampler[int]):
    """Draws an epoch in random order, with each class as often as any other.

    An epoch has as many windows as the dataset. All windows of a class come equally often in it, give or take one: of a
    class that has too many, a random part is left out, and one that has too few is gone through again.
    (``WeightedRandomSampler`` draws with replacement: it would miss 37% of the windows of two classes of equal size.)

    Its state is where it is: a StatefulDataLoader saves it, and goes on from there.

    Args:
        labels: The class of each window, shape (windows,).

    Example::

        >>> sampler = BalancedSampler(np.array([0, 0, 0, 0, 1, 1]))
        >>> [[0, 0, 0, 0, 1, 1][window] for window in sorted(sampler)]
        [0, 0, 0, 1, 1, 1]
    """

    def __init__(self, labels: npt.NDArray[np.integer]) -> None:
        self._labels = np.asarray(labels)
        self._seed = 0
        self._yielded = 0
        self._resumes = False

    def __len__(self) -> int:
        return len(self._labels)

    def __iter__(self) -> Iterator[int]:
        if not self._resumes:
            self._seed, self._yielded = int(torch.empty((), dtype=torch.int64).random_()), 0
        self._resumes = False
        return self._rest(self._draw())

    def _rest(self, order: npt.NDArray[np.int64]) -> Iterator[int]:
        for position in range(self._yielded, len(order)):
            self._yielded = position + 1
            yield int(order[position])

    def _draw(self) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng(self._seed)
        classes = np.unique(self._labels)
        quota, left = divmod(len(self._labels), len(classes))
        drawn = []
        for place, label in enumerate(rng.permutation(classes)):
            windows = np.flatnonzero(self._labels == label)
            repeats, more = divmod(quota + (place < left), len(windows))
            drawn += [np.tile(windows, repeats), rng.permutation(windows)[:more]]
        return rng.permutation(np.concatenate(drawn))

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self._seed, "yielded": self._yielded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seed, self._yielded, self._resumes = state["seed"], state["yielded"], True
