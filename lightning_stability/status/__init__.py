"""`lightning-stability status` and `report`: how a run is doing, from what it has written so far."""

from lightning_stability.status.command import show_status
from lightning_stability.status.page import leave_page, show_report
from lightning_stability.status.report import Report, look
from lightning_stability.status.run import Run

__all__ = ["Report", "Run", "leave_page", "look", "show_report", "show_status"]
