"""PrecisionFallback: a run that fp16 cannot hold continues in fp32, with the very same batch."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from pytorch_lightning.utilities.rank_zero import rank_zero_info

from lightning_stability._compat import is_instance_by_name
from lightning_stability.callbacks.base import StabilityCallback
from lightning_stability.callbacks.incident import listed
from lightning_stability.callbacks.loggers import call_logger, notify_loggers
from lightning_stability.callbacks.precision_change import PrecisionChange, why_it_cannot_be_changed
from lightning_stability.health import StepRecord
from lightning_stability.health.layer_scales import LayerScales
from lightning_stability.health.values import named_tensors, nonfinite_names
from lightning_stability.internals import input_dtype, logger_step, window_is_open
from lightning_stability.notices import warn
from lightning_stability.recovery.precision import (
    BITS,
    Higher,
    WiderWeights,
    extra_memory,
    free_memory,
    go_on_in,
    make_plugin,
)
from lightning_stability.runtime import DeliberateError, Order, Outcome, session_of
from lightning_stability.runtime.validation import ValidationRetries

FP16_MAX = 65504.0
_LOW = ("16-mixed", "16-true", "bf16-mixed")


class FallbackMemoryError(DeliberateError, RuntimeError):
    """The device has no room for the batches in the higher precision."""


class PrecisionFallback(StabilityCallback):
    """Leaves 16-bit precision for a higher one when the run cannot continue in it, and trains the same batch again.

    It acts on a loss or a gradient that is not finite, if GradScaler has no answer to it. Then the forward pass
    overflows, the loss scale is below 1 (`Session.min_loss_scale`), or more than 20 updates in a row were skipped
    (`Session.max_consecutive_skips`). An update that GradScaler skips now and then is none of these.

    Buffers, metrics, random numbers and gradients are restored to before the batch. With accumulation that is before
    the first batch of the window. Then the precision is changed, and the batches are trained again. One step is
    counted, and no sample is lost. If they are not finite in the higher precision either, precision was not the
    cause. The run then returns to the precision it had, and the step is skipped.

    While training in 16 bits the host reads one number per step. After the change the callback does nothing, and
    costs nothing. Numbers that are not finite in the higher precision are left to `NaNEarlyStop`.

    Logged every `log_every_n_steps` steps, and at the change:

    | key | meaning |
    |---|---|
    | `precision_bits` | 16 or 32 |
    | `loss_scale` | GradScaler's scale, in 16-mixed; 1 once it is left |

    Args:
        to: `"32-true"`, or `"bf16-mixed"` for fp16.

    Raises:
        MisconfigurationException: If `to` is neither; at setup, under a strategy or precision plugin whose precision
            cannot be changed (FSDP, FSDP2, DeepSpeed, a custom one).

    Example:
        >>> from pytorch_lightning import Trainer
        >>> from lightning_stability import PrecisionFallback
        >>> trainer = Trainer(max_steps=100, callbacks=[PrecisionFallback()], logger=False)
    """

    order = Order.RETRY
    guards = True

    def __init__(self, to: Higher = "32-true") -> None:
        super().__init__()
        self._require_one_of("32-true", "bf16-mixed", to=to)
        self.to = to
        self._change: PrecisionChange | None = None
        self._clear()

    def _clear(self) -> None:
        self._low_plugin: Any = None
        self._wider: WiderWeights | None = None
        self._ranges: LayerScales | None = None
        self._validation: ValidationRetries | None = None
        self._change_next = False
        self._is_done = False
        self._not_the_cause = 0
        self._need: float | None = None
        self._loss_scale: float | None = None
        self._steps = 0

    def is_needed(self, trainer: Any) -> bool:
        """Only in a precision that it can leave."""
        precision = str(trainer.precision)
        return precision in _LOW and precision != self.to

    # A fit.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """What an earlier fit of another Trainer changed was that one's."""
        if stage == "fit":
            self._clear()
            if self._change is not None and self._change.to != str(trainer.precision):
                self._change = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Watch the validation too, that before the first step included."""
        session = self.session
        if session is not None:
            self._validation = ValidationRetries(trainer, self, lambda: session.uncast)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Go on in the precision that the run had fallen back to, before anything is made for another one."""
        change = PrecisionChange.of((checkpoint.get("callbacks") or {}).get(self.state_key) or {})
        if change is None or change.to == str(trainer.precision):
            return
        objection = self.objection(trainer)
        if objection is not None:
            warn(f"PrecisionFallback: {change.describe()}, but continues in {trainer.precision}: {objection}")
            return
        rank_zero_info(f"PrecisionFallback: resuming in {change.to}: {change.describe()}.")
        go_on_in(change.fallen_from, trainer, checkpoint)
        session = session_of(trainer)
        if session is not None:
            session.use_plugin(make_plugin(trainer, change.to))
        else:
            trainer.strategy.precision_plugin = make_plugin(trainer, change.to)
        if not self.is_needed(trainer):
            self._leave_session()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Say which precision it is."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._loss_scale = None if scaler is None else scaler.get_scale()
        if trainer.global_step == 0:
            self._log_precision(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Leave the run to itself if the precision is another one now; make here what change a step did not allow."""
        if window_is_open(trainer):
            return
        if self._change_next:
            self._change_next, self._is_done = False, True
            self._raise_precision(trainer)
        if self._is_done and self.session is not None:
            self._is_done = False
            self._low_plugin = self._wider = None
            self.session.drain()
            self._leave_validation()
            self._leave_session()
            self._loss_scale = None if self._loss_scale is None else 1.0
            self._log_precision(trainer)
            self._loss_scale = None
        elif (logger_step(trainer) + 1) % trainer.log_every_n_steps == 0:
            self._log_precision(trainer)
        if self._need is None and self.session is not None and self._steps > 1:
            self._look_for_room(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say what became of the precision."""
        if self.session is not None or self._change is not None:
            changed = self._change.describe() if self._change is not None else "no change"
            count = self._not_the_cause
            tried = f"; it was not the cause of {count} bad step{'s' if count > 1 else ''}" if count else ""
            rank_zero_info(f"PrecisionFallback: {changed}{tried}.")

    def state_dict(self) -> dict[str, Any]:
        """The precision that the run has fallen back to, and why."""
        return {} if self._change is None else asdict(self._change)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember that it has."""
        self._change = PrecisionChange.of(state_dict)

    # A bad step.

    def wants_retry(self) -> bool:
        """As long as the run is in 16 bits."""
        session = self.session
        return session is not None and self.is_needed(session.trainer) and not self._change_next

    def on_record(self, record: StepRecord) -> None:
        """Count it, and keep what is logged of it."""
        self._steps += 1
        self._loss_scale = record.loss_scale if record.loss_scale is not None else self._loss_scale

    def before_retry(self) -> None:
        """Change the precision, and watch what flows through the layers."""
        assert self.session is not None
        trainer = self.session.trainer
        if self._need is None and _is_on_cuda(trainer):
            self._need = extra_memory(trainer, self.to)
        self._raise_precision(trainer)
        self._ranges = LayerScales(trainer.lightning_module)
        self._ranges.__enter__()

    def after_retry(self, failed: StepRecord, again: StepRecord) -> StepRecord:
        """Stay if that helped; else return to where the run was."""
        assert self.session is not None
        ranges = self._stop_watching()
        low = self._low_plugin.precision
        if again.outcome != Outcome.APPLIED:
            self._lower_precision()
            self._say_not_the_cause(failed, low, f"not finite in {self.to} either")
            return again
        why = self._reason(failed)
        beyond = ranges.first_beyond(FP16_MAX) if ranges is not None and low.startswith("16") else None
        if beyond is not None:
            layer, side, least, largest = beyond
            why += f"; the {side} of `{layer}` ranges from {least:.4g} to {largest:.4g}, and fp16 ends at 65,504"
        self._note_change(failed, low, why)
        self._say_change("The batch has been trained in {to}, and so will be the rest.")
        self._is_done = True
        return again

    def no_memory_for_retry(self, record: StepRecord) -> Exception:
        """The device has no room for the batches in the higher precision."""
        self._stop_watching()
        need = f" (about {self._need / 2**30:.1f} GiB more than before)" if self._need is not None else ""
        self._write("precision_out_of_memory", record, precision_to=self.to, extra_bytes=self._need)
        return FallbackMemoryError(
            f"PrecisionFallback: epoch {record.epoch}, batch {record.batch_idx} is not finite in 16 bits and does not"
            f" fit into memory in {self.to}{need}. No weight has been changed by it and the last checkpoint"
            " stands: resume from it with a smaller batch and more accumulation, or with precision=bf16-mixed."
        )

    def cannot_retry(self, record: StepRecord, why: str) -> None:
        """Change once the batch is over, unless its input says that this would not help."""
        assert self.session is not None
        trainer = self.session.trainer
        bad = self._nonfinite_inputs(record)
        if trainer.strategy.reduce_boolean_decision(bool(bad), all=False):
            where = listed(bad) if bad else "the input of another rank"
            self._say_not_the_cause(record, str(trainer.precision), f"not finite, and {where} was so before")
            return
        self._change_next = True
        self._note_change(record, str(trainer.precision), self._reason(record), retried=False)
        self._say_change(f"Training continues in {{to}}, but this batch is not trained again: {why}.")

    # A validation batch.

    def wants_validation_retry(self) -> bool:
        """As long as the run is in 16 bits."""
        return self.wants_retry()

    def before_validation_retry(self) -> None:
        """Change the precision."""
        assert self.session is not None
        self._raise_precision(self.session.trainer)

    def after_validation_retry(self, batch_idx: int, why: str, helped: bool) -> None:
        """Stay if that helped; else return to where the run was."""
        assert self.session is not None
        trainer = self.session.trainer
        low = self._low_plugin.precision
        if not helped:
            self._lower_precision()
            return
        step, epoch = trainer.global_step, trainer.current_epoch
        self._change = PrecisionChange(low, self.to, step, epoch, batch_idx, f"in validation, {why}")
        self._is_done = True
        if trainer.is_global_zero:
            details = {"batch_idx": batch_idx, "precision_from": low, "precision_to": self.to, "why": self._change.why}
            self.session.events.write("precision_changed", step, epoch, **details)
        self._say_change("The batch has been validated in {to}, and the run continues in it.")

    def _nonfinite_inputs(self, record: StepRecord) -> list[str]:
        """Which of the batch's tensors no precision would help."""
        assert self.session is not None
        if record.loss_finite or input_dtype(self.session.trainer.precision_plugin) is not None:
            return []  # (what it was before a cast to fp16 is not known here)
        return nonfinite_names(named_tensors(self.session.recent_batch(record)))

    def _say_not_the_cause(self, record: StepRecord, low: str, what: str) -> None:
        self._not_the_cause += 1
        why = f"{what}: {low} was not the cause"
        self._write("precision_kept", record, precision=low, why=why)
        warn(f"PrecisionFallback: epoch {record.epoch}, batch {record.batch_idx} is {why}.")

    def _reason(self, record: StepRecord) -> str:
        if not record.loss_finite:
            return f"the loss was {record.loss}"
        if record.bad_loss_ranks:
            return f"the loss was not finite on rank {record.bad_loss_ranks[0]}"
        if record.skipped_by == "GradScaler":
            return f"gradients overflow at every loss scale, which has fallen to {record.loss_scale:g}"
        return f"a gradient was {record.gradients} while the loss was finite"

    # The change.

    def _raise_precision(self, trainer: Any) -> None:
        assert self.session is not None
        self._low_plugin = trainer.precision_plugin
        if input_dtype(self._low_plugin) is not None:
            self._wider = WiderWeights(trainer)
            self._wider.widen()
        self.session.use_plugin(make_plugin(trainer, self.to))

    def _lower_precision(self) -> None:
        assert self.session is not None
        if self._wider is not None:
            self._wider.narrow()
        self.session.use_plugin(self._low_plugin)
        self._low_plugin = self._wider = None

    def _stop_watching(self) -> LayerScales | None:
        ranges, self._ranges = self._ranges, None
        if ranges is not None:
            ranges.__exit__(None, None, None)
        return ranges

    def on_session_end(self, exception: BaseException | None) -> None:
        """The second try may have failed."""
        self._stop_watching()
        self._leave_validation()

    def _leave_validation(self) -> None:
        if self._validation is not None:
            self._validation.remove()
            self._validation = None

    # What is said of it.

    def _note_change(self, record: StepRecord, low: str, why: str, **details: Any) -> None:
        self._change = PrecisionChange(low, self.to, record.step, record.epoch, record.batch_idx, why)
        self._write("precision_changed", record, precision_from=low, precision_to=self.to, why=why, **details)

    def _say_change(self, what_next: str) -> None:
        change = self._change
        assert change is not None
        assert self.session is not None
        what = (
            f"{change.fallen_from} cannot continue at {change.place}: {change.why}."
            f" {what_next.format(to=change.to)}{self._about_compilation()}"
        )
        warn(f"PrecisionFallback: {what}")
        trainer = self.session.trainer
        notify_loggers(trainer, "Precision changed", what, "lightning_stability/precision", logger_step(trainer))

    def _about_compilation(self) -> str:
        assert self.session is not None
        module = self.session.trainer.lightning_module
        parts = any(is_instance_by_name(part, "OptimizedModule") for part in module.modules())
        compiled = parts or getattr(module, "_compiler_ctx", None) is not None
        return " What is compiled is compiled once more for it." if compiled else ""

    def _log_precision(self, trainer: Any) -> None:
        if (self.session is None and self._change is None) or not trainer.is_global_zero:
            return
        metrics = {"precision_bits": float(BITS[str(trainer.precision)])}
        if self._loss_scale is not None:
            metrics["loss_scale"] = self._loss_scale
        for logger in trainer.loggers:
            call_logger(logger, partial(logger.log_metrics, metrics, step=logger_step(trainer)))

    def _write(self, event: str, record: StepRecord, **details: Any) -> None:
        assert self.session is not None
        if self.session.trainer.is_global_zero:
            self.session.events.write(event, record.step, record.epoch, batch_idx=record.batch_idx, **details)

    def _look_for_room(self, trainer: Any) -> None:
        """After the second step, when it is known what a step takes beside gradients and states: would more fit?"""
        if not _is_on_cuda(trainer):
            return
        self._need = extra_memory(trainer, self.to)
        free = free_memory(trainer.strategy.root_device)
        if self._need > free:
            warn(
                f"PrecisionFallback: {self.to} would need about {self._need / 2**30:.1f} GiB more than"
                f" {trainer.precision}, and {free / 2**30:.1f} GiB are free: a fallback would run out of memory."
                " A smaller batch with more accumulation leaves room for it."
            )

    def objection(self, trainer: Any) -> str | None:
        """Why this Trainer's precision cannot be changed; None if it can."""
        return why_it_cannot_be_changed(trainer)

    def __getstate__(self) -> dict[str, Any]:
        gone = {"_low_plugin": None, "_wider": None, "_ranges": None, "_validation": None}
        return {**super().__getstate__(), **gone}


def _is_on_cuda(trainer: Any) -> bool:
    return bool(trainer.strategy.root_device.type == "cuda")
