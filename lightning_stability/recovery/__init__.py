"""What undoes damage: skipping an update, restoring buffers and metric states."""

from lightning_stability.recovery.guard import Guard, Verdict
from lightning_stability.recovery.metric_undo import MetricUndo
from lightning_stability.recovery.undo import BufferUndo

__all__ = ["BufferUndo", "Guard", "MetricUndo", "Verdict"]
