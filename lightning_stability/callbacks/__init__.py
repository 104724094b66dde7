"""The callbacks: one file each."""

from lightning_stability.callbacks.grad_norm_monitor import GradNormMonitor
from lightning_stability.callbacks.nan_early_stop import NaNEarlyStop, NonFiniteError
from lightning_stability.callbacks.precision_fallback import PrecisionFallback

__all__ = ["GradNormMonitor", "NaNEarlyStop", "NonFiniteError", "PrecisionFallback"]
