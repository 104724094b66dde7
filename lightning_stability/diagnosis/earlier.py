"""Weights of before the step, from the checkpoints of its run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from lightning_stability.checkpointing.listing import find_checkpoints
from lightning_stability.checkpointing.verification import load_checkpoint
from lightning_stability.diagnosis.incident import Incident


def earlier_weights(incident: Incident) -> list[tuple[int, Callable[[], dict[str, Tensor]]]]:
    """The step of each checkpoint from before an incident, the newest first, and what loads its weights.

    Args:
        incident: In the folder where the run wrote it, beside its checkpoints; elsewhere there are none.
    """
    step = incident.about["details"].get("step")
    run = incident.folder.resolve().parent.parent
    if not isinstance(step, int) or incident.folder.resolve().parent.name != "incidents":
        return []
    found = {info.step: info.path for info in find_checkpoints(run) if info.complete and info.finite is not False}
    before = sorted((at for at in found if at is not None and at <= step), reverse=True)
    return [(at, partial(_weights, found[at])) for at in before]


def _weights(path: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = load_checkpoint(path, verify=False)["state_dict"]
    return weights
