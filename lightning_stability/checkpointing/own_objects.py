"""Checkpoints that hold Python objects of the user's own, which `weights_only=True` does not load."""

from __future__ import annotations

import contextlib
import importlib
import io
from typing import Any

import torch
from fsspec.core import url_to_fs  # type: ignore[import-untyped]


def needs_pickle(path: str) -> bool:
    """Whether a checkpoint holds Python objects, so that by itself it loads with `weights_only=False` alone."""
    with contextlib.suppress(Exception):  # a folder, a file system that is gone
        files, name = url_to_fs(path)
        with files.open(name, "rb") as file:
            return bool(_objects_in(file))
    return False


def allow_own_hyperparameters(module: Any) -> None:
    """Let checkpoints load that hold such objects as this module has among its hyperparameters itself.

    Nothing else is allowed: what a file names and this program does not use stays refused.

    Args:
        module: The LightningModule that is to be trained, before Lightning loads a checkpoint.
    """
    hyperparameters = getattr(module, "hparams_initial", None)
    if not hyperparameters:
        return
    buffer = io.BytesIO()
    with contextlib.suppress(Exception):  # what cannot be pickled is in no checkpoint
        torch.save(dict(hyperparameters), buffer)
        buffer.seek(0)
        found = [_find(name) for name in _objects_in(buffer)]
        torch.serialization.add_safe_globals([cls for cls in found if isinstance(cls, type)])  # no function


def without_objects(checkpoint: dict[str, Any]) -> list[str]:
    """Take hyperparameters that only `weights_only=False` loads out of a checkpoint: a resume does not need them.

    Returns:
        Their names.
    """
    names = []
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        values = checkpoint.get(key)
        if not isinstance(values, dict):
            continue
        odd = [name for name, value in values.items() if _needs_objects(value)]
        checkpoint[key] = {name: value for name, value in values.items() if name not in odd}
        names += odd
    return names


def _needs_objects(value: Any) -> bool:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return bool(_objects_in(buffer))


def _objects_in(file: Any) -> list[str]:
    """The names that the file needs, whatever this process allows by now."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(file)
    finally:
        torch.serialization.add_safe_globals(allowed)


def _find(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    with contextlib.suppress(ImportError, AttributeError):
        return getattr(importlib.import_module(module), attribute)
    return getattr(_find(module), attribute)  # a class within a class
