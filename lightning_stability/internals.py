"""Every private name of Lightning and torch that the package uses, once each.

`tests/test_internals.py` has a test for each of them, which fails when a new version moves it. Public names are used
where they are needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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


# --- Modules, metrics and tensors ---


# --- Autograd and dispatch, for diagnosis ---


def current_backward_node() -> torch.autograd.graph.Node | None:
    """The node whose backward function runs now in this thread; None outside of a backward pass."""
    return torch._C._current_autograd_node()  # type: ignore[no-any-return, attr-defined]


def newest_node_number() -> int:
    """The number of the autograd node made last in this thread: of the operation that is being dispatched.

    An operation's node is made just before its kernel is dispatched.
    """
    return torch.autograd._get_sequence_nr() - 1  # type: ignore[no-any-return, attr-defined]


def node_number(node: torch.autograd.graph.Node) -> int:
    """The number of a node, as `newest_node_number` gave it when its operation ran."""
    return node._sequence_nr()  # type: ignore[no-any-return, attr-defined]


def backward_engine_code() -> Any:
    """The code object of the Python function that every backward pass is started by."""
    return torch.autograd.graph._engine_run_backward.__code__  # type: ignore[attr-defined]


class StorageKey:
    """The identity of a tensor's memory, not used again for other memory as long as this object lives.

    It does not keep the memory.
    """

    __slots__ = ("_weak", "key")

    def __init__(self, tensor: Tensor) -> None:
        storage = strided_values(tensor).untyped_storage()
        self.key: int = storage._cdata
        self._weak = storage._weak_ref()  # type: ignore[no-untyped-call]

    def __del__(self) -> None:
        torch.UntypedStorage._free_weak_ref(self._weak)  # type: ignore[no-untyped-call]


def storage_key(tensor: Tensor) -> int:
    """The key that `StorageKey(tensor)` has."""
    return strided_values(tensor).untyped_storage()._cdata  # type: ignore[no-any-return]


def strided_values(tensor: Tensor) -> Tensor:
    """The tensor that holds the values of one that is sparse or nested; others as they are."""
    if tensor.layout == torch.strided:
        return tensor
    if tensor.layout == torch.sparse_coo:
        return tensor._values()  # `values()` needs a coalesced one
    return tensor.values()  # type: ignore[no-untyped-call, no-any-return]
