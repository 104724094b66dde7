"""The runtime: one session per Trainer and fit, which sees every step and shows it to the policies in their order."""

from lightning_stability.runtime.manual_windows import ManualWindow
from lightning_stability.runtime.policies import DeliberateError, Order, Policy
from lightning_stability.runtime.record import Outcome
from lightning_stability.runtime.retry import Retrier
from lightning_stability.runtime.session import Session, session_of
from lightning_stability.runtime.trainers import log_folder
from lightning_stability.runtime.windows import BadStep

__all__ = [
    "BadStep",
    "DeliberateError",
    "ManualWindow",
    "Order",
    "Outcome",
    "Policy",
    "Retrier",
    "Session",
    "log_folder",
    "session_of",
]
