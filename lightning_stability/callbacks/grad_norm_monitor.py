"""GradNormMonitor: gradient norms in the logger, right in every precision and next to free."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

from lightning_stability._compat import MisconfigurationException, is_instance_by_name
from lightning_stability.callbacks.base import StabilityCallback
from lightning_stability.callbacks.loggers import call_logger, log_metrics, loggers_for_extra_keys
from lightning_stability.health import ParameterGroups, StepRecord
from lightning_stability.health.trend import NormTrend, Rise
from lightning_stability.notices import warn


class GradNormMonitor(StabilityCallback):
    """Logs the L2 norms of the gradients, and warns when they rise.

    The norms are those of the true gradients: after accumulation, without GradScaler's scale, before clipping. They
    are measured at every optimizer step, in one pass over the gradients, and nothing waits for the device. So a value
    may reach the logger a few steps later, under the step that it belongs to.

    Logged every `every_n_steps` steps:

    | key | meaning |
    |---|---|
    | `grad_norm/total` | norm of all gradients together at this step |
    | `grad_norm/total_max` | the largest total since the last logged step, this one included |
    | `grad_norm/<group>` | norm of one group's gradients (see `group_depth`) |
    | `grad_norm/clip_coefficient` | factor that clipping by norm applied; 1.0 when it left them alone |
    | `grad_norm/nonfinite_steps` | steps so far with NaN, infinite or overflowing gradients |
    | `loss_scale` | GradScaler's scale, in 16-mixed |
    | `update_ratio/<group>` | norm of the update over norm of the weights, with `log_update_ratio` |

    With several optimizers (manual optimization) the keys read `grad_norm/optimizer_0/total` and so on, by the
    optimizer's place in `configure_optimizers`. A value that is not finite is left out and counted. Without a logger
    the callback does nothing.

    Args:
        group_depth: Leading components of a module's path that make a group: with 2,
            `encoder.blocks.0.attn.weight` belongs to `encoder.blocks`.
        every_n_steps: How often to log, in optimizer steps; None for the Trainer's `log_every_n_steps`.
        log_update_ratio: Whether to log update ratios. A logged step then holds a second copy of the trained
            weights while the optimizer runs.

    Raises:
        MisconfigurationException: If an option is out of range, or, at setup, if the strategy hides the
            gradients (DeepSpeed, XLA).

    Example:
        >>> from pytorch_lightning import Trainer
        >>> from lightning_stability import GradNormMonitor
        >>> trainer = Trainer(max_steps=100, callbacks=[GradNormMonitor(group_depth=1)], logger=False)
    """

    read_every = 8  # a rise is called out in time, and most steps are spared the reading

    def __init__(self, group_depth: int = 2, every_n_steps: int | None = None, log_update_ratio: bool = False) -> None:
        super().__init__()
        self.group_depth = _at_least_one("group_depth", group_depth)
        self.every_n_steps = None if every_n_steps is None else _at_least_one("every_n_steps", every_n_steps)
        self._require_flag(log_update_ratio=log_update_ratio)
        self.log_update_ratio = log_update_ratio
        self._log_interval = 0
        self._statistics: dict[int, _Statistics] = {}
        self._restored: dict[int, dict[str, Any]] = {}
        self._charted: set[int] = set()

    def is_needed(self, trainer: Any) -> bool:
        """Only with a logger that keeps something; `fast_dev_run` has one that does not."""
        return any(not is_instance_by_name(logger, "DummyLogger") for logger in trainer.loggers)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the Trainer's runtime."""
        self._log_interval = self.every_n_steps or trainer.log_every_n_steps
        self._charted.clear()

    def wants_update(self, logger_step: int) -> bool:
        """On logged steps, if asked for."""
        return self.log_update_ratio and self._is_due(logger_step)

    def on_record(self, record: StepRecord) -> None:
        """Count the step in; log it if it is due; call out a rise."""
        statistics = self._statistics_of(record)
        rise = statistics.add(record)
        if rise is not None:
            self._call_out(record, rise)
        if self._is_due(record.logger_step):
            self._log(record, statistics)

    def state_dict(self) -> dict[str, Any]:
        """The counts, the peak and the trend of each optimizer."""
        if self.session is not None:
            self.session.drain()
        live = {index: statistics.state_dict() for index, statistics in self._statistics.items()}
        return {"optimizers": {**self._restored, **live}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self._statistics.clear()
        self._restored = dict(state_dict["optimizers"])

    def _is_due(self, logger_step: int) -> bool:
        # Lightning logs at the same steps: its counter is one behind when it asks.
        return self._log_interval > 0 and (logger_step + 1) % self._log_interval == 0

    def _statistics_of(self, record: StepRecord) -> _Statistics:
        statistics = self._statistics.get(record.optimizer)
        if statistics is None:
            statistics = self._statistics[record.optimizer] = _Statistics(record, self.group_depth)
            restored = self._restored.pop(record.optimizer, None)
            if restored is not None:
                statistics.load_state_dict(restored)
        else:
            names = statistics.groups.parameter_names
            # As a rule it is the same tuple, and need not be compared name by name.
            if names is not record.parameter_names and names != record.parameter_names:
                statistics.regroup(record, self.group_depth)
        return statistics

    def _log(self, record: StepRecord, statistics: _Statistics) -> None:
        assert self.session is not None
        trainer = self.session.trainer
        several = len(trainer.optimizers) > 1
        metrics = statistics.metrics(record, f"optimizer_{record.optimizer}/" if several else "")
        statistics.peak = None
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers if self.asked_for else loggers_for_extra_keys(trainer):
            log_metrics(logger, metrics, record.logger_step, self.asked_for)
        if record.optimizer not in self._charted:
            self._charted.add(record.optimizer)
            if self.asked_for:
                self._lay_out_charts(trainer, several, scaled=record.loss_scale is not None)

    def _call_out(self, record: StepRecord, rise: Rise) -> None:
        assert self.session is not None
        details = {
            "group": rise.group,
            "group_ratio": rise.group_ratio,
            "ratio": rise.ratio,
            "norm": record.total_norm,
        }
        if self.session.trainer.is_global_zero:
            self.session.events.write("gradient_norm_rising", record.step, record.epoch, **details)
        warn(
            f"GradNormMonitor: the gradient norm is rising: {record.total_norm:.3g} at step {record.step},"
            f" {rise.ratio:.3g} times its usual value; group `{rise.group}` grew most, to"
            f" {rise.group_ratio:.3g} times its own. A lower learning rate or gradient_clip_val holds it."
        )

    def _lay_out_charts(self, trainer: Any, several: bool, scaled: bool) -> None:
        """Give TensorBoard its charts: all groups in one, and beside it what belongs to the total."""
        charts: dict[str, list[Any]] = {}
        for index in sorted(self._charted):
            prefix = f"optimizer_{index}/" if several else ""
            title = f" (optimizer {index})" if several else ""
            groups = [f"grad_norm/{prefix}{_tag(name)}" for name in self._statistics[index].groups.names]
            charts["norm by group" + title] = _lines(groups)
            charts["total" + title] = _lines([f"grad_norm/{prefix}total", f"grad_norm/{prefix}total_max"])
            if trainer.gradient_clip_val:
                charts["clip coefficient" + title] = _lines([f"grad_norm/{prefix}clip_coefficient"])
        if scaled:
            charts["loss scale"] = _lines(["loss_scale"])
        for logger in trainer.loggers:
            if is_instance_by_name(logger, "TensorBoardLogger"):
                call_logger(logger, partial(logger.experiment.add_custom_scalars, {"gradients": charts}))


class _Statistics:
    """What is kept of one optimizer's steps."""

    def __init__(self, record: StepRecord, group_depth: int) -> None:
        self.groups = ParameterGroups(record.parameter_names, group_depth)
        self.trend = NormTrend(self.groups.names, self.groups.norms)
        self.nonfinite_steps = 0
        self.peak: float | None = None

    def regroup(self, record: StepRecord, group_depth: int) -> None:
        """The trained parameters are others now, and with them what is usual."""
        self.groups = ParameterGroups(record.parameter_names, group_depth)
        self.trend = NormTrend(self.groups.names, self.groups.norms)

    def add(self, record: StepRecord) -> Rise | None:
        if not record.gradients_finite:
            self.nonfinite_steps += 1
            return None
        self.peak = record.total_norm if self.peak is None else max(self.peak, record.total_norm)
        return self.trend.update(record.total_norm, record.grad_norms)

    def metrics(self, record: StepRecord, prefix: str) -> dict[str, float]:
        """The logged keys and values of one step; values that are not finite are left out."""
        values: dict[str, float | None] = {
            f"grad_norm/{prefix}total": record.total_norm if record.gradients_finite else None,
            f"grad_norm/{prefix}total_max": self.peak,
            f"grad_norm/{prefix}clip_coefficient": record.clip_coefficient,
            f"grad_norm/{prefix}nonfinite_steps": float(self.nonfinite_steps),
            "loss_scale": record.loss_scale,
        }
        for name, norm in zip(self.groups.names, self.groups.norms(record.grad_norms).tolist(), strict=True):
            values[f"grad_norm/{prefix}{_tag(name)}"] = norm
        if record.weight_norms is not None and record.update_norms is not None:
            weights = self.groups.norms(record.weight_norms).tolist()
            updates = self.groups.norms(record.update_norms).tolist()
            for name, weight, update in zip(self.groups.names, weights, updates, strict=True):
                # weights of 0, as biases start, have no ratio
                values[f"update_ratio/{prefix}{name}"] = update / weight if weight else None
        return {key: value for key, value in values.items() if value is not None and math.isfinite(value)}

    def state_dict(self) -> dict[str, Any]:
        return {"nonfinite_steps": self.nonfinite_steps, "peak": self.peak, "trend": self.trend.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.nonfinite_steps, self.peak = state["nonfinite_steps"], state["peak"]
        self.trend.load_state_dict(state["trend"])


_OWN_NAMES = ("total", "total_max", "clip_coefficient", "nonfinite_steps")


def _tag(group: str) -> str:
    """A group's name in its key; one that is called like a key of ours is told apart."""
    return f"{group}.group" if group in _OWN_NAMES else group


def _lines(tags: list[str]) -> list[Any]:
    return ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]]


def _at_least_one(option: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MisconfigurationException(
            f"GradNormMonitor({option}={value!r}): expected a whole number of at least 1; give one or leave it out."
        )
    return value
