"""Where in the user's code an operation was asked for: file, line, and the module whose code it is."""

from __future__ import annotations

import bisect
import functools
import linecache
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning_utilities
import pytorch_lightning
import torch
import torchmetrics
from torch import nn

from lightning_stability.internals import (
    backward_engine_code,
    current_backward_node,
    newest_node_number,
    node_number,
)

_PACKAGE = Path(__file__).parents[1]
_OWN_USER = str(_PACKAGE / "tuab") + "/"  # the included trainer is a user of the package
_SITE = Path(pytorch_lightning.__file__).parents[1]
_LIBRARIES = (
    *(f"{Path(package.__file__ or '').parent}/" for package in (torch, torchmetrics, lightning_utilities)),
    *(f"{_SITE / name}/" for name in ("pytorch_lightning", "lightning", "lightning_fabric")),
    f"{_PACKAGE}/",
)
_STANDARD_LIBRARY = sysconfig.get_path("stdlib") + "/"
_INSTALLED = "/site-packages/"


@dataclass(frozen=True, slots=True)
class Place:
    """Where an operation was asked for.

    Attributes:
        module: The path of the deepest registered module in whose code it happened; `""` is the root.
        file: The user's file; None if no code of the user's is involved, as in an optimizer's step.
        line: The line in it.
        node: In the backward pass: the autograd node's name, such as `SqrtBackward0`.
    """

    module: str | None = None
    file: str | None = None
    line: int | None = None
    node: str | None = None

    @property
    def code(self) -> str:
        """The text of the line."""
        return linecache.getline(self.file, self.line or 0).strip() if self.file else ""


class PlaceFinder:
    """Says where an operation comes from that is being dispatched."""

    def __init__(self, module: nn.Module) -> None:
        self._paths = {id(m): plain_path(path) for path, m in module.named_modules()}
        self._forward: dict[int, Place] = {}
        """By the number of the autograd node that the operation made."""
        self._numbers: list[int] = []
        """Those, in order."""
        self._engine = backward_engine_code()
        self.outermost: Any = None
        """The frame that runs the module: neither it nor those that called it asked for an operation."""

    def here(self) -> Place:
        """Where the operation comes from that is being dispatched."""
        node = current_backward_node()
        module, file, line = self._of_stack(sys._getframe(2), node is not None)
        # code that runs in the backward pass is a derivative of the user's own, or the forward pass of a checkpointed
        # block again, which needs gradients
        if node is not None and (file is None or not torch.is_grad_enabled()):
            forward = self._forward_of(node)
            if file is None:
                file, line = forward.file, forward.line
            place = Place(forward.module, file, line, node.name())
        elif node is not None and module is None:
            place = Place(self._forward_of(node).module, file, line)
        else:
            place = Place(module, file, line)
        # The first operation with a number is the one that made the node; others follow that make none. (The forward
        # pass of a custom function runs without gradients, after its node was made.)
        number = newest_node_number()
        if number not in self._forward:
            self._forward[number] = place
            bisect.insort(self._numbers, number)
        return place

    def _forward_of(self, node: torch.autograd.graph.Node) -> Place:
        """Where the operation that a node differentiates was asked for.

        It has the node's number or, where torch.func made several nodes of it, the next one that any operation has.
        """
        index = bisect.bisect_left(self._numbers, node_number(node))
        return self._forward[self._numbers[index]] if index < len(self._numbers) else Place()

    def _of_stack(self, frame: Any, in_backward: bool) -> tuple[str | None, str | None, int | None]:
        module = file = line = None
        while frame is not None and frame is not self.outermost and (module is None or file is None):
            code = frame.f_code
            if in_backward and code is self._engine:
                break  # what follows called the backward pass, and did not ask for this operation
            if file is None and is_of_user(code.co_filename):
                file, line = code.co_filename, frame.f_lineno
            if module is None and code.co_argcount and code.co_varnames[0] == "self":
                module = self._paths.get(id(frame.f_locals.get("self")))
            frame = frame.f_back
        return module, file, line


def plain_path(path: str) -> str:
    """A module's path without what `torch.compile` adds to it."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


@functools.cache
def is_of_user(file: str) -> bool:
    """Whether a file is neither torch's, Lightning's, Python's nor this package's.

    Args:
        file: As a code object names it.
    """
    if file.startswith("<") or (file.startswith(_LIBRARIES) and not file.startswith(_OWN_USER)):
        return False
    return not file.startswith(_STANDARD_LIBRARY) or _INSTALLED in file
