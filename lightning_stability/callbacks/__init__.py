"""One file per callback: what it decides and what it logs, in Lightning's vocabulary."""

from lightning_stability.callbacks.fractional_checkpoint import FractionalCheckpoint
from lightning_stability.callbacks.grad_norm_monitor import GradNormMonitor

__all__ = ["FractionalCheckpoint", "GradNormMonitor"]
