"""Ways that need no package: what people write by hand, or switch on in Lightning."""

from __future__ import annotations

import re
import traceback
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import grad_norm


class LogGradNorms(pl.Callback):
    """The recipe of Lightning's documentation, at every step."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        pl_module.log_dict(grad_norm(pl_module, norm_type=2))


class NonFiniteOutput(Exception):
    """As Hugging Face's `DebugUnderflowOverflow` ends a run."""


class ModuleTracer(pl.Callback):
    """A forward hook on each module, which ends the run at the first output that is not finite, and names it."""

    def __init__(self) -> None:
        self.places: list[str] = []
        self.handles: list[Any] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        for name, module in pl_module.named_modules():
            self.handles.append(module.register_forward_hook(self._hook(name)))

    def _hook(self, name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            for what, values in ("input", inputs), ("output", output):
                if any(not bool(torch.isfinite(t).all()) for t in _tensors(values)):
                    self.places += [f"{name} (its input)"] if what == "input" else [name]
                    raise NonFiniteOutput(f"nan or inf in the {what} of {name} ({type(module).__name__})")

        return hook

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        for handle in self.handles:
            handle.remove()


def _tensors(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values] if values.is_floating_point() else []
    if isinstance(values, dict):
        values = list(values.values())
    return [tensor for value in values for tensor in _tensors(value)] if isinstance(values, (list, tuple)) else []


class AnomalyText:
    """The forward traceback that `detect_anomaly` warns of."""

    text = ""


def lines_of_anomaly(error: BaseException | None) -> list[str]:
    """The lines of the forward pass that the anomaly mode names."""
    said = AnomalyText.text + ("" if error is None else "".join(traceback.format_exception(error)))
    return lines_in(said)


def lines_in(text: str) -> list[str]:
    """The lines of the user's own code in a traceback."""
    found = re.findall(r'File "([^"]+)", line (\d+)', text)
    return [f"{file}:{line}" for file, line in found if "site-packages" not in file and "benchmarks" not in file]
