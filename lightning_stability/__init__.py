"""Callbacks that keep a Lightning run alive and honest when numbers go bad, and say why they went bad."""

from lightning_stability.callbacks import (
    FractionalCheckpoint,
    GradNormMonitor,
    InputCheck,
    InputError,
    NaNEarlyStop,
    NonFiniteError,
    PrecisionFallback,
)

__version__ = "0.1.0"

__all__ = [
    "FractionalCheckpoint",
    "GradNormMonitor",
    "InputCheck",
    "InputError",
    "NaNEarlyStop",
    "NonFiniteError",
    "PrecisionFallback",
    "__version__",
]
