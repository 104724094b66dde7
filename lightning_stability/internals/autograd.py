"""Private names of autograd and dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
