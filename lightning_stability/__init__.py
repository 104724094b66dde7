"""Callbacks that keep NaN and infinity out of a Lightning run, and find out where they came from."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "FractionalCheckpoint",
    "GradNormMonitor",
    "IncidentReport",
    "InputCheck",
    "InputError",
    "NaNEarlyStop",
    "NonFiniteError",
    "PrecisionFallback",
    "SpikeRecovery",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("lightning_stability.callbacks"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _only_reads_events() -> bool:
    """Whether this process is `lightning-stability status` or `report`, which need neither torch nor Lightning."""
    if sys.argv[1:2] not in (["status"], ["report"]):
        return False
    name = Path(sys.argv[0]).stem
    if name == "-m":  # as Python calls it while it imports the package
        name = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    return name in ("lightning-stability", "lightning", __name__)


if TYPE_CHECKING or not _only_reads_events():
    # at once: the command line knows the short names of callbacks that have been imported
    from lightning_stability.callbacks import (
        FractionalCheckpoint,
        GradNormMonitor,
        IncidentReport,
        InputCheck,
        InputError,
        NaNEarlyStop,
        NonFiniteError,
        PrecisionFallback,
        SpikeRecovery,
    )
