"""Checkpoints that several ranks have written together: a folder of torch's distributed checkpoint format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

METADATA = ".metadata"
"""torch's own: which tensor is where. It is written last."""

REST = "meta.pt"
"""Lightning's: what is no tensor of the module's or an optimizer's."""


def is_sharded(path: Path) -> bool:
    """Whether a path is a folder of that format."""
    return (path / METADATA).is_file() and (path / REST).is_file()


def read_rest(path: Path) -> dict[str, Any]:
    """What a folder holds besides weights and optimizer state."""
    rest: dict[str, Any] = torch.load(path / REST, map_location="cpu", weights_only=True)
    return rest
