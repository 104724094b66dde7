"""One file of a checkpoint that several ranks have written together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lightning_stability import internals
from lightning_stability.checkpointing.sharded import load_sharded
from lightning_stability.checkpointing.verification import UnusableError
from lightning_stability.checkpointing.writing import write_file


def consolidate(folder: Path, target: Path) -> None:
    """Put a folder's shards together, as Lightning saves without shards. All of it has to fit into host memory.

    Args:
        folder: Of torch's distributed checkpoint format.
        target: The file; an older one of that name stays until this one is complete.

    Raises:
        UnusableError: If the folder is damaged, or something in it is not finite and not so by design.
        OSError: If the file cannot be written.
    """
    _, names = load_sharded(folder, verify=True)
    if names:
        raise UnusableError(f"not finite: {', '.join(names[:3])}")
    checkpoint = internals.load_all_shards(folder)
    if "state_dict" not in checkpoint:  # Lightning's FSDP1
        checkpoint["state_dict"] = checkpoint.pop("model")
    found = sorted((int(m[1]), name) for name in checkpoint if (m := re.fullmatch(r"optimizer_(\d+)", name)))
    states = [_by_number(checkpoint.pop(name)) for _, name in found]
    if states:
        checkpoint["optimizer_states"] = states
    write_file(checkpoint, str(target))


def _by_number(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with its weights numbered, as torch's optimizers load it, where shards go by name."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    if not all(isinstance(name, str) for name in names):
        return state
    number = {name: place for place, name in enumerate(names)}
    return {
        "state": {number[name]: of_weight for name, of_weight in state.get("state", {}).items()},
        "param_groups": [
            {**group, "params": [number[name] for name in group["params"]]} for group in state["param_groups"]
        ],
    }
