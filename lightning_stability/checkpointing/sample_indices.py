"""Which samples of the dataset a training batch is made of, as its loader's sampler said."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

from torch.utils.data import default_collate
from torch.utils.data.dataloader import _BaseDataLoaderIter


class SampleIndices:
    """Notes what the samplers of data loaders yield, and gives it back batch by batch.

    Loaders ask their sampler in the order in which they deliver, some batches ahead where workers load. While a fit
    runs, the method of torch's loader iterators that asks it is stood in for; no sampler, loader or state is another
    for it, and torchdata's StatefulDataLoader asks by the same method.

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
        self._active = False

    def start(self) -> None:
        """Listen from now on."""
        if not self._active:
            self._active = True
            _LISTENERS.add(self)
            _BaseDataLoaderIter._next_index = _next_index  # type: ignore[method-assign]

    def stop(self) -> None:
        """Listen no more; with the last listener torch's method is its own again."""
        _LISTENERS.discard(self)
        if self._active and not _LISTENERS:
            _BaseDataLoaderIter._next_index = _ORIGINAL  # type: ignore[method-assign]
        self._active = False

    def take(self, iterator: Any) -> list[int] | None:
        """What the next batch consists of that this iterator delivered; to be called once for each.

        Args:
            iterator: A loader's.

        Returns:
            Positions in the dataset; None if they are not known, and where a `collate_fn` of the user's makes the batch
            of them: it may sort it.
        """
        asked = _ASKED.get(iterator) if iterator is not None else None
        if asked is None or not asked.indices:
            return None
        batch = asked.indices.popleft()
        ordered = getattr(iterator, "_in_order", True) and iterator._collate_fn is default_collate
        if asked.lost or not ordered:
            return None
        if isinstance(batch, (list, tuple)) and all(isinstance(i, int) for i in batch):
            return list(batch)
        return None  # an IterableDataset's has none, and a loader without batches of its own one for the whole batch


class _Asked:
    """What one iterator was told that it has not delivered yet."""

    def __init__(self) -> None:
        self.sampler: Any = None
        self.indices: deque[Any] = deque(maxlen=4096)  # nobody takes those of a validation
        self.lost = False


_ORIGINAL = _BaseDataLoaderIter._next_index
_LISTENERS: weakref.WeakSet[SampleIndices] = weakref.WeakSet()
_ASKED: weakref.WeakKeyDictionary[Any, _Asked] = weakref.WeakKeyDictionary()


def _next_index(iterator: Any) -> Any:
    index = _ORIGINAL(iterator)  # type: ignore[no-untyped-call]
    asked = _ASKED.setdefault(iterator, _Asked())
    if asked.sampler is not iterator._sampler_iter:  # an epoch begins: what was asked ahead is not delivered any more
        asked.sampler = iterator._sampler_iter
        asked.indices.clear()
        asked.lost = False
    asked.lost |= len(asked.indices) == asked.indices.maxlen
    asked.indices.append(index)
    return index
