"""Which samples of the dataset a training batch is made of, as its loader's sampler said."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

from torch.utils.data import default_collate

from lightning_stability.checkpointing.loader_hooks import LoaderListener
from lightning_stability.internals import collates_by, delivers_in_order, sampler_iterator


class SampleIndices(LoaderListener):
    """Notes what the samplers of data loaders yield, and hands it out batch by batch.

    Loaders ask their sampler in the order in which they deliver, some batches ahead where workers load. While a fit
    runs, the method of torch's loader iterators that asks it is replaced; samplers, loaders and their states are not.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> indices = SampleIndices()
        >>> indices.start()
        >>> iterator = iter(DataLoader(range(4), batch_size=2))
        >>> _ = next(iterator)
        >>> indices.take(iterator)
        [0, 1]
        >>> indices.stop()
    """

    def __init__(self) -> None:
        self._asked: weakref.WeakKeyDictionary[Any, _Asked] = weakref.WeakKeyDictionary()

    def take(self, iterator: Any) -> list[int] | None:
        """Positions in the dataset of the next batch that this iterator delivered; to be called once for each.

        None if they are not known, and where a `collate_fn` of the user's makes the batch of them: it may sort it.
        """
        # (a list's iterator, or a tuple's, cannot be referred to weakly; nor has it a sampler)
        asked = self._asked.get(iterator) if type(iterator).__weakrefoffset__ else None
        if asked is None or not asked.indices:
            return None
        batch = asked.indices.popleft()
        ordered = delivers_in_order(iterator) and collates_by(iterator) is default_collate
        if asked.lost or not ordered:
            return None
        if isinstance(batch, (list, tuple)) and all(isinstance(i, int) for i in batch):
            return list(batch)
        return None  # an IterableDataset's has none, and a loader without batches of its own one for the whole batch

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleIndices, ()  # what it has heard belongs to this process's loaders

    def on_index(self, iterator: Any, index: Any) -> None:
        """An iterator has asked its sampler."""
        asked = self._asked.setdefault(iterator, _Asked())
        sampler = sampler_iterator(iterator)
        if asked.sampler is not sampler:  # an epoch begins: what was asked ahead is not delivered any more
            asked.sampler = sampler
            asked.indices.clear()
            asked.lost = False
        asked.lost |= len(asked.indices) == asked.indices.maxlen
        asked.indices.append(index)


class _Asked:
    """What one iterator was told that it has not delivered yet."""

    def __init__(self) -> None:
        self.sampler: Any = None
        self.indices: deque[Any] = deque(maxlen=4096)  # nobody takes those of a validation
        self.lost = False
