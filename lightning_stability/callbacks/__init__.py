"""The callbacks: one file each."""

from lightning_stability.callbacks.grad_norm_monitor import GradNormMonitor
from lightning_stability.callbacks.nan_early_stop import NaNEarlyStop, NonFiniteError

__all__ = ["GradNormMonitor", "NaNEarlyStop", "NonFiniteError"]
