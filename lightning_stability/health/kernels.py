"""Modules of Triton kernels, where there is a Triton that can take them."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch


@functools.cache
def load_kernels(name: str) -> Any:
    """A module of kernels; None without a Triton that can take them.

    Args:
        name: The module's, in this package.
    """
    if torch.version.hip is not None:
        return None
    try:
        return importlib.import_module(f"lightning_stability.health.{name}")
    except Exception:  # not installed, or too old or too new
        return None
