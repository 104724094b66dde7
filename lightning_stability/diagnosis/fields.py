"""What has to stand in `incident.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from lightning_stability.diagnosis.errors import DiagnosisError

_NUMBER = (int, float)
_KNOWN_FILES = {"batches.pt", "state.pt", "random.pt", "history.jsonl"}
_OF_MODULE: dict[str, Any] = {
    "class": str,
    "file": (str, type(None)),
    "hyperparameters": dict,
    "not_kept": list,
    "eval": list,
}
_TYPES: dict[str, Any] = {
    "precision": str,
    "failed": str,
    "optimizer": int,
    "loss_divisor": int,
    "loss_scale": (*_NUMBER, type(None)),
    "clip_value": (*_NUMBER, type(None)),
    "clip_algorithm": (str, type(None)),
    "steps_before": int,
    "schedulers": list,
    "validation_loader": (int, type(None)),
    "losses": list,
    "batch_indices": list,
    "trainer": dict,
    "notes": list,
    "module": dict,
    "optimizer_options": list,
    "environment": dict,
    "details": dict,
    "left_out": dict,
    "files": dict,
}


def check_fields(about: dict[str, Any], path: str) -> None:
    """Check that every field of `incident.json` is there and of its kind.

    Args:
        path: Its name in the error.

    Raises:
        DiagnosisError: If one is not.
    """
    wrong = next(_what_is_wrong(about), None)
    if wrong is not None:
        raise DiagnosisError(f"{path}: {wrong}. The folder is not as it was written")


def _what_is_wrong(about: dict[str, Any]) -> Iterator[str]:
    for name, kind in _TYPES.items():
        if name not in about:
            yield f"the field {name!r} is missing"
        if not isinstance(about[name], kind):
            yield f"the field {name!r} is a {type(about[name]).__name__}"
    for name in ("batch_indices", "schedulers"):
        if not all(isinstance(index, int) for index in about[name]):
            yield f"{name} are no whole numbers"
    if about["loss_divisor"] < 1:
        yield f"loss_divisor is {about['loss_divisor']}; expected 1 or more"
    if not all(_is_hex(loss) for loss in about["losses"]):
        yield "losses are no hexadecimal numbers"
    module = about["module"]
    if not all(isinstance(module.get(name), kind) for name, kind in _OF_MODULE.items()) or ":" not in module["class"]:
        yield "the field 'module' names no class"
    if not {"random.pt", "history.jsonl"} <= set(about["files"]) <= _KNOWN_FILES:
        yield "it lists other files than an incident has"
    for file in about["files"].values():
        if not (isinstance(file, dict) and isinstance(file.get("bytes"), int) and isinstance(file.get("sha256"), str)):
            yield "a file has no size or no checksum"
    threads = about["environment"].get("threads", 1)
    if not (isinstance(threads, int) and 0 < threads < 10_000):
        yield f"it names {threads!r} threads"


def digest(about: dict[str, Any]) -> str:
    """A checksum of the fields.

    Args:
        about: The content of `incident.json`, without its checksum.
    """
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _is_hex(number: Any) -> bool:
    try:
        float.fromhex(number)
    except (TypeError, ValueError):
        return False
    return True
