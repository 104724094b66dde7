"""What a machine's results depend on: device, versions, settings of torch; recorded, compared, and set again."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytorch_lightning
import torch

Environment = dict[str, Any]

_MACHINE = ("device", "processor", "threads", "torch", "python", "numpy", "lightning")


def capture_environment(device: torch.device) -> Environment:
    """What the results of a step depend on besides its state.

    Example:
        >>> capture_environment(torch.device("cpu"))["device"]
        'cpu'
    """
    return {
        "device": device.type,
        "processor": _processor(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "lightning": pytorch_lightning.__version__,
        "settings": {
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "mkldnn": torch.backends.mkldnn.enabled,  # type: ignore[attr-defined]
            "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        },
    }


def differences(recorded: Environment, here: Environment) -> list[str]:
    """What is not as it was recorded, in words."""
    names = [name for name in _MACHINE if recorded.get(name) != here.get(name)]
    return [f"{name}: {recorded.get(name)} recorded, {here.get(name)} here" for name in names]


@contextlib.contextmanager
def settings_of(recorded: Environment) -> Iterator[None]:
    """Use the recorded settings of torch for a while.

    Args:
        recorded: What `capture_environment` gave; may be empty.
    """
    before = capture_environment(torch.device("cpu"))
    _apply(recorded)
    try:
        yield
    finally:
        _apply(before)


def _apply(environment: Environment) -> None:
    settings = environment.get("settings", {})
    if environment.get("threads"):
        torch.set_num_threads(environment["threads"])
    if "deterministic_algorithms" in settings:
        torch.use_deterministic_algorithms(settings["deterministic_algorithms"], warn_only=True)
    if "cudnn_benchmark" in settings:
        torch.backends.cudnn.benchmark = settings["cudnn_benchmark"]
        torch.backends.cudnn.deterministic = settings["cudnn_deterministic"]
    if "float32_matmul_precision" in settings:
        torch.set_float32_matmul_precision(settings["float32_matmul_precision"])
    if "default_dtype" in settings:
        torch.set_default_dtype(getattr(torch, settings["default_dtype"]))


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"  # type: ignore[no-untyped-call]
