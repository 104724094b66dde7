"""The runtime: one object per Trainer and fit, which owns the hooks into the step and asks the policies in order."""

from lightning_stability.runtime.policies import Policy
from lightning_stability.runtime.retries import Retrier
from lightning_stability.runtime.run_events import RunEvents
from lightning_stability.runtime.runtime import Runtime, runtime_of
from lightning_stability.runtime.trainers import log_folder, logger_step, window_is_open

__all__ = ["Policy", "Retrier", "RunEvents", "Runtime", "log_folder", "logger_step", "runtime_of", "window_is_open"]
