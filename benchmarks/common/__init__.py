"""What the benchmarks share: on which machine, how values spread, where they are written, and no chatter meanwhile."""

from __future__ import annotations

import json
import logging
import platform
import statistics
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on.

    Args:
        device: Where it was computed.
    """
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "pytorch_lightning": pl.__version__,
        "python": platform.python_version(),
    }


def spread(values: list[float]) -> dict[str, float]:
    """The median of some values, and their range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def save(report: dict[str, Any], path: Path | None) -> None:
    """Write all figures; again after each part, so that a run that is cut short leaves what it has.

    Args:
        report: The figures.
        path: The file; None for none.
    """
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")


def quiet() -> None:
    """Keep Lightning from filling the tables' screen."""
    warnings.filterwarnings("ignore")
    for namespace in ("pytorch_lightning", "lightning.pytorch"):
        for name in (namespace, f"{namespace}.utilities.rank_zero"):
            logging.getLogger(name).setLevel(logging.ERROR)
