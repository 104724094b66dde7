"""One file per callback: what it decides and what it logs, in Lightning's vocabulary."""

from lightning_stability.callbacks.fractional_checkpoint import FractionalCheckpoint
from lightning_stability.callbacks.grad_norm_monitor import GradNormMonitor
from lightning_stability.callbacks.incident import NonFiniteError
from lightning_stability.callbacks.incident_report import IncidentReport
from lightning_stability.callbacks.input_check import InputCheck, InputError
from lightning_stability.callbacks.nan_early_stop import NaNEarlyStop
from lightning_stability.callbacks.precision_fallback import PrecisionFallback
from lightning_stability.callbacks.spike_recovery import SpikeRecovery

__all__ = [
    "FractionalCheckpoint",
    "GradNormMonitor",
    "IncidentReport",
    "InputCheck",
    "InputError",
    "NaNEarlyStop",
    "NonFiniteError",
    "PrecisionFallback",
    "SpikeRecovery",
]
