"""`lightning-stability status`: how a run is doing, from what it has written so far."""

from lightning_stability.status.command import show_status
from lightning_stability.status.report import Report, look
from lightning_stability.status.run import Run

__all__ = ["Report", "Run", "look", "show_status"]
