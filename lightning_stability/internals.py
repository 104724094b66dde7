"""Every private name of Lightning and torch that the package uses, once each.

`tests/test_internals.py` has a test for each of them, which fails when a new version moves it. Public names are used
where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree
from torch.utils.data.dataloader import _BaseDataLoaderIter

_ABSENT = object()


class Overrides:
    """Attributes that are set on instances for a while; `restore` undoes them, the last one first.

    What somebody else has set over one of ours in the meantime is left as it is.

    Example:
        >>> class Loop:
        ...     def advance(self):
        ...         return "its own"
        >>> loop, overrides = Loop(), Overrides()
        >>> overrides.set(loop, "advance", lambda: "ours")
        >>> loop.advance()
        'ours'
        >>> overrides.restore()
        >>> loop.advance()
        'its own'
    """

    def __init__(self) -> None:
        self._stack: list[tuple[Any, str, Any, Any]] = []

    def set(self, instance: Any, name: str, value: Any) -> None:
        """Set an attribute of one instance; its class is left alone."""
        before = vars(instance).get(name, _ABSENT)
        setattr(instance, name, value)
        self._stack.append((instance, name, value, before))

    def restore(self) -> None:
        """Undo everything that was set."""
        while self._stack:
            instance, name, value, before = self._stack.pop()
            if vars(instance).get(name, _ABSENT) is not value:
                continue
            if before is _ABSENT:
                delattr(instance, name)
            else:
                setattr(instance, name, before)


# --- The training loop ---


# --- Precision plugins and optimizers ---


# --- Loggers ---


# --- Checkpoints, loop progress and data loaders ---

LoaderIterator = _BaseDataLoaderIter
"""What iterating over a DataLoader gives; torchdata's StatefulDataLoader derives from it too."""

NEXT_INDEX = "_next_index"
"""Its method that asks the sampler for the indices of a batch."""


def sampler_iterator(iterator: Any) -> Any:
    """The sampler's iterator that a loader's iterator asks; another one for each epoch."""
    return iterator._sampler_iter


def collates_by(iterator: Any) -> Any:
    """The function by which a loader's iterator makes a batch of samples."""
    return iterator._collate_fn


def delivers_in_order(iterator: Any) -> bool:
    """Whether a loader's iterator yields batches in the order in which the sampler gave them."""
    return getattr(iterator, "_in_order", True)


# --- Modules, metrics and tensors ---


def leaves_with_paths(tree: Any) -> list[tuple[str, Any]]:
    """What dicts, lists, tuples and named tuples hold, each with its path, such as `['eeg'][0].x`.

    Of other classes, those that derive from dict or list too, the objects themselves.
    """
    leaves, _ = _pytree.tree_flatten_with_path(tree)
    return [(_pytree.keystr(path), leaf) for path, leaf in leaves]


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same nesting, with the function applied to what `leaves_with_paths` finds."""
    return _pytree.tree_map(function, tree)


def within_compiled(module: nn.Module) -> nn.Module | None:
    """The module that `torch.compile(module)` was given; None of any other module."""
    compiled = isinstance(module, torch._dynamo.OptimizedModule)  # type: ignore[attr-defined]
    return module._orig_mod if compiled else None  # type: ignore[return-value]


def compiles_its_call(module: nn.Module) -> bool:
    """Whether calling a module runs a graph that hooks on it would be compiled into.

    `module.compile()` makes it so, and Lightning's own mark on a module whose steps are compiled as a whole.
    """
    return module._compiled_call_impl is not None or getattr(module, "_compiler_ctx", None) is not None


def has_own_parameters(module: nn.Module) -> bool:
    """Whether a module holds parameters itself, beside those of its children."""
    return any(weight is not None for weight in module._parameters.values())


# --- Autograd and dispatch, for diagnosis ---
