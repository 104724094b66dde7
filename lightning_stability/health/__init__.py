"""What one training step's tensors say: finite or not, norms, scale; measured once, on the device."""

from lightning_stability.health.gradients import GradientMeter, Measurement
from lightning_stability.health.late_reads import LateReads
from lightning_stability.health.record import ParameterGroups, StepRecord

__all__ = ["GradientMeter", "LateReads", "Measurement", "ParameterGroups", "StepRecord"]
