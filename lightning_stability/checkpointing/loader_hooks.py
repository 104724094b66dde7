"""The three places of torch's loader iterators where an order is begun and asked for, told to whoever listens.

Nothing of the user's is replaced: loaders, samplers and their states stay as they are, and torchdata's
StatefulDataLoader has the same three.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch.utils.data import DataLoader

from lightning_stability.internals import BEGIN_ANEW, NEXT_INDEX, LoaderIterator, Overrides


class LoaderListener:
    """Is told what the iterators of all loaders do, from `start` to `stop`."""

    def start(self) -> None:
        """Listen from now on."""
        if not _LISTENERS:
            for name, function in _HOOKS.items():
                _OVERRIDES.set(LoaderIterator, name, function)
            _OVERRIDES.set(DataLoader, "__iter__", _iterate)
        _LISTENERS.add(self)

    def stop(self) -> None:
        """Listen no more; with the last listener torch's methods are its own again."""
        _LISTENERS.discard(self)
        if not _LISTENERS:
            _OVERRIDES.restore()

    def holds(self, loader: Any) -> bool:
        """Whether iterating over a loader shall yield nothing for now, and start no workers."""
        return False

    def on_begin(self, iterator: Any, loader: Any, is_made: bool) -> None:
        """The sampler is about to be iterated over.

        Args:
            is_made: Whether the iterator is being made. One with workers begins a second time then.
        """

    def on_begun(self, iterator: Any, loader: Any, is_made: bool) -> None:
        """The sampler's iterator is made; if `is_made`, the workers are not started yet."""

    def on_ask(self, iterator: Any) -> None:
        """The sampler is about to be asked for a batch's indices."""

    def on_index(self, iterator: Any, index: Any) -> None:
        """The sampler has given a batch's indices."""


_ORIGINAL_INIT = LoaderIterator.__init__
_ORIGINAL_BEGIN = getattr(LoaderIterator, BEGIN_ANEW)
_ORIGINAL_NEXT = getattr(LoaderIterator, NEXT_INDEX)
_ORIGINAL_ITER = DataLoader.__iter__
_OVERRIDES = Overrides()
_LISTENERS: weakref.WeakSet[LoaderListener] = weakref.WeakSet()


def _iterate(loader: Any) -> Any:
    return iter(()) if any(listener.holds(loader) for listener in _LISTENERS) else _ORIGINAL_ITER(loader)


def _init(iterator: Any, loader: Any) -> None:
    for listener in list(_LISTENERS):
        listener.on_begin(iterator, loader, True)
    _ORIGINAL_INIT(iterator, loader)
    for listener in list(_LISTENERS):
        listener.on_begun(iterator, loader, True)


def _begin(iterator: Any, loader: Any, first_iter: bool = False) -> None:
    for listener in list(_LISTENERS):
        listener.on_begin(iterator, loader, False)
    _ORIGINAL_BEGIN(iterator, loader, first_iter)
    for listener in list(_LISTENERS):
        listener.on_begun(iterator, loader, False)


def _next_index(iterator: Any) -> Any:
    for listener in list(_LISTENERS):
        listener.on_ask(iterator)
    index = _ORIGINAL_NEXT(iterator)
    for listener in list(_LISTENERS):
        listener.on_index(iterator, index)
    return index


_HOOKS = {"__init__": _init, BEGIN_ANEW: _begin, NEXT_INDEX: _next_index}
