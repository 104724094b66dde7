"""What undoes damage: skipping an update, restoring buffers and metric states."""

from lightning_stability.recovery.guard import Guard
from lightning_stability.recovery.metric_undo import MetricUndo
from lightning_stability.recovery.undo import BufferUndo
from lightning_stability.recovery.verdict import Verdict

__all__ = ["BufferUndo", "Guard", "MetricUndo", "Verdict"]
