"""Other ways to treat spikes, as callbacks. ZClip and OLMo's are written from their published descriptions."""

from __future__ import annotations

import importlib.util
import math
import statistics
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn


def norm_of_gradients(module: nn.Module) -> float:
    """Their total norm; a host read."""
    return float(nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]))


class ZClip(Callback):
    """Norms more than 2.5 standard deviations above their moving average are clipped (arXiv 2504.02507)."""

    def __init__(self, alpha: float = 0.97, threshold: float = 2.5, warmup: int = 25) -> None:
        self.alpha, self.threshold, self.warmup = alpha, threshold, warmup
        self.first: list[float] = []
        self.mean = self.variance = 0.0

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        norm = norm_of_gradients(module)
        if len(self.first) < self.warmup:
            self.first.append(norm)
            self.mean, self.variance = statistics.fmean(self.first), statistics.pvariance(self.first)
            return
        std = math.sqrt(self.variance)
        z = (norm - self.mean) / (std + 1e-6)
        if z > self.threshold:
            limit = self.mean + self.threshold**2 / z * std
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(limit / norm)
            norm = limit
        self.mean = self.alpha * self.mean + (1 - self.alpha) * norm
        self.variance = self.alpha * self.variance + (1 - self.alpha) * (norm - self.mean) ** 2


class SkipStep(Callback):
    """OLMo's: no step whose loss or norm is beyond 6 standard deviations of the last 128, spikes counted among them.

    Its own skip multiplies by 0; this one leaves the update out, which is kinder where a number is NaN.
    """

    def __init__(self, sigma: float = 6.0, window: int = 128) -> None:
        self.sigma = sigma
        self.losses: deque[float] = deque(maxlen=window)
        self.norms: deque[float] = deque(maxlen=window)
        self.skipped: list[int] = []

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        self.loss = float(loss)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        norm = norm_of_gradients(module)
        if not (self._is_usual(self.loss, self.losses) and self._is_usual(norm, self.norms)):
            self.skipped.append(trainer.global_step)
            for parameter in module.parameters():
                parameter.grad = None
        self.losses.append(self.loss)
        self.norms.append(norm)

    def _is_usual(self, value: float, window: deque[float]) -> bool:
        if len(window) < (window.maxlen or 0) // 2:
            return True
        if not all(map(math.isfinite, window)):
            return False
        return value - statistics.fmean(window) <= self.sigma * statistics.stdev(window)


def spike_detection(rtol: float = 2.0) -> Callback:
    """Lightning's own, which raises."""
    from pytorch_lightning.callbacks.spike import SpikeDetection

    return SpikeDetection(rtol=rtol, exclude_batches_path=str(Path(tempfile.mkdtemp()) / "skip.json"))


def has_arc() -> bool:
    """Whether arc-training is installed."""
    return importlib.util.find_spec("arc") is not None


def arc() -> Callback:
    """arc-training's callback, with its defaults."""
    from arc.api.integrations import LightningCallback  # type: ignore[import-not-found]

    class Arc(LightningCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(verbose=False)
            self.skipped: list[int] = []

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            before = self.skipped_steps
            super().on_before_optimizer_step(trainer, module, optimizer)
            if self.skipped_steps > before:
                self.skipped.append(trainer.global_step)

    return Arc()
