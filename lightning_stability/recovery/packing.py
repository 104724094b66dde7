"""A snapshot in the form in which a checkpoint can hold it: by names, in memory of its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_stability.recovery.snapshots import Snapshot

_PLAIN = ("step", "epoch", "batch", "position")


def pack(snapshot: Snapshot, names: Mapping[Any, str]) -> dict[str, Any]:
    """What a checkpoint keeps of a snapshot: all but the metrics of its epoch."""
    snapshot.wait()
    states = [{names[p]: values for p, values in state.items() if p in names} for state in snapshot.trained["states"]]
    packed = {
        **{name: getattr(snapshot, name) for name in _PLAIN},
        "weights": snapshot.trained["weights"],
        "states": states,
        "others": snapshot.others,
    }
    return copy.deepcopy(packed)


def unpack(packed: dict[str, Any], parameters: Mapping[str, nn.Parameter]) -> Snapshot:
    """The snapshot again, trusted, for the parameters of this run."""
    states = [{parameters[name]: values for name, values in state.items()} for state in packed["states"]]
    return Snapshot(
        **{name: packed[name] for name in _PLAIN},
        trusted=True,
        trained={"weights": packed["weights"], "states": states},
        others=packed["others"],
    )
