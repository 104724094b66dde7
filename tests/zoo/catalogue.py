"""The names of the zoo's programs."""

from __future__ import annotations

import importlib
from pathlib import Path

from tests.zoo.program import Program

_HELPERS = {"__init__", "calibration", "catalogue", "program", "recording", "table"}
_FILES = [path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("test_")]
NAMES = sorted(name for name in _FILES if name not in _HELPERS)


def held_out(name: str) -> bool:
    """Whether no rule of the diagnosis may be made with it."""
    return getattr(importlib.import_module(f"tests.zoo.{name}"), "held_out", False)


def program(name: str, seed: int) -> Program:
    """A fresh program; what is random in it follows from torch's random state."""
    made: Program = importlib.import_module(f"tests.zoo.{name}").program(seed)
    return made


HEALTHY = [name for name in NAMES if name.startswith("healthy_")]
FAILURES = [name for name in NAMES if name not in HEALTHY]
