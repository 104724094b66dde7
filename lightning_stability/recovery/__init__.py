"""What undoes damage: skipping an update, giving back buffers and metric states."""

from lightning_stability.recovery.guard import Guard
from lightning_stability.recovery.metric_undo import MetricUndo
from lightning_stability.recovery.retry import OpenWindow
from lightning_stability.recovery.undo import BufferUndo

__all__ = ["BufferUndo", "Guard", "MetricUndo", "OpenWindow"]
