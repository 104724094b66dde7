"""PrecisionFallback: fp16 that cannot go on is left for fp32, on the very same batch."""

from __future__ import annotations

from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from lightning_stability._compat import MisconfigurationException, is_instance_by_name
from lightning_stability.callbacks.base import RuntimeCallback
from lightning_stability.health import StepRecord
from lightning_stability.health.layer_scales import LayerScales
from lightning_stability.recovery.precision import BITS, Higher, WiderWeights, make_plugin

FP16_MAX = 65504.0
_LOW = ("16-mixed", "16-true", "bf16-mixed")
_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")


class PrecisionFallback(RuntimeCallback):
    """Leaves 16-bit precision for a higher one when it cannot go on, and trains the same batch again in it.

    It acts on a loss or a gradient that is not finite and that GradScaler has no answer to: a forward pass that
    overflows, a loss scale below 1 (`Runtime.min_loss_scale`), more than 20 skipped updates in a row
    (`Runtime.max_consecutive_skips`). An update that GradScaler skips now and then is none of these.

    Buffers, metrics, random numbers and gradients are put back to before the batch (with accumulation: to before the
    first batch of the window, whose batches are kept until the optimizer steps), the precision is changed, and the
    batches are trained again: one step is counted, no sample is lost, nothing of the failed try is left. If they are
    not finite in the higher precision either, precision was not the cause: the run returns to the precision it had,
    and the step is skipped as `NaNEarlyStop` would.

    While training in 16 bits the host reads one number per step; after the change it costs nothing.

    Logged at the start and at each change:

    | key | meaning |
    |---|---|
    | `precision_bits` | 16 or 32 |

    Args:
        to: `"32-true"`, or `"bf16-mixed"` for fp16.

    Raises:
        MisconfigurationException: If `to` is neither; at setup, under a strategy or precision plugin whose precision
            cannot be changed (FSDP, FSDP2, DeepSpeed, one of your own).

    Example:
        >>> from pytorch_lightning import Trainer
        >>> from lightning_stability import PrecisionFallback
        >>> trainer = Trainer(max_steps=100, callbacks=[PrecisionFallback()], logger=False)
    """

    guards = True

    def __init__(self, to: Higher = "32-true") -> None:
        super().__init__()
        if to not in ("32-true", "bf16-mixed"):
            raise MisconfigurationException(f'PrecisionFallback(to={to!r}): expected "32-true" or "bf16-mixed".')
        self.to = to
        self._fallen_from: str | None = None
        self._clear()

    def _clear(self) -> None:
        self._low_plugin: Any = None
        self._wider: WiderWeights | None = None
        self._ranges: LayerScales | None = None
        self._change_next = False
        self._not_the_cause = 0
        self._need: float | None = None

    def is_needed(self, trainer: Any) -> bool:
        """Only in a precision that it can leave, or in a run that it has left it in."""
        precision = str(trainer.precision)
        return precision in _LOW and precision != self.to

    # A fit.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the Trainer's runtime."""
        if stage == "fit":
            self._clear()
            objection = self._objection(trainer) if self.is_needed(trainer) else None
            if objection is not None:
                self._refuse(trainer, objection)
                return
        super().setup(trainer, pl_module, stage)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Go on in the precision that the run had fallen back to, before anything is made for another one."""
        state = (checkpoint.get("callbacks") or {}).get(self.state_key) or {}
        if self._runtime is None or not state.get("fallen_from"):
            return
        rank_zero_info(
            f"PrecisionFallback: resuming in {state['to']}, which this run fell back to from {state['fallen_from']}."
        )
        self._runtime.use_plugin(make_plugin(trainer, state["to"]))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Say which precision it is."""
        super().on_train_start(trainer, pl_module)
        self._log_precision(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Change here what could not be changed within a step."""
        if self._change_next:
            self._change_next = False
            self._raise_precision(trainer)
            self._settle(trainer)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the first batch, estimate whether the device has room for the change."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._need is None and self.wants_retry() and trainer.strategy.root_device.type == "cuda":
            self._need = extra_memory(trainer)
            free = free_memory(trainer.strategy.root_device)
            if self._need > free:
                rank_zero_warn(
                    f"PrecisionFallback: {self.to} would need about {self._need / 2**30:.1f} GiB more than"
                    f" {trainer.precision}, and {free / 2**30:.1f} GiB are free: a fallback would run out of memory."
                    " A smaller batch with more accumulation leaves room for it."
                )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say what became of the precision."""
        super().on_train_end(trainer, pl_module)
        if self._runtime is not None:
            changed = f"fell back from {self._fallen_from} to {self.to}" if self._fallen_from else "no change"
            tried = f"; tried {self._not_the_cause} times in vain" if self._not_the_cause else ""
            rank_zero_info(f"PrecisionFallback: {changed}{tried}.")

    def state_dict(self) -> dict[str, Any]:
        """The precision that the run has fallen back to."""
        return {"fallen_from": self._fallen_from, "to": self.to}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember that it has."""
        self._fallen_from = state_dict["fallen_from"]

    # A bad step.

    def wants_retry(self) -> bool:
        """As long as the run is in 16 bits."""
        runtime = self._runtime
        return runtime is not None and str(runtime.trainer.precision) in _LOW and not self._change_next

    def before_retry(self, record: StepRecord) -> None:
        """Change the precision, and watch what flows through the layers."""
        assert self._runtime is not None
        trainer = self._runtime.trainer
        self._raise_precision(trainer)
        self._ranges = LayerScales(trainer.lightning_module)
        self._ranges.__enter__()

    def after_retry(self, failed: StepRecord, again: StepRecord) -> StepRecord:
        """Stay if that helped; else return to where the run was."""
        assert self._runtime is not None
        assert self._ranges is not None
        trainer = self._runtime.trainer
        self._ranges.__exit__(None, None, None)
        ranges, self._ranges = self._ranges, None
        low = self._low_plugin.precision
        if again.outcome != "taken":
            self._not_the_cause += 1
            self._lower_precision(trainer)
            why = f"not finite in {self.to} either: {low} was not the cause"
            self._write("precision_kept", failed, precision=low, why=why)
            rank_zero_warn(f"PrecisionFallback: epoch {failed.epoch}, batch {failed.batch_idx} is {why}.")
            return again
        why = self._reason(failed)
        beyond = ranges.first_beyond(FP16_MAX) if low.startswith("16") else None
        if beyond is not None:
            layer, side, least, largest = beyond
            why += f"; the {side} of `{layer}` ranges from {least:.4g} to {largest:.4g}, and fp16 ends at 65,504"
        self._fallen_from = low
        self._write("precision_changed", failed, precision_from=low, precision_to=self.to, why=why)
        rank_zero_warn(
            f"PrecisionFallback: {low} cannot go on at epoch {failed.epoch}, batch {failed.batch_idx}, global step"
            f" {failed.step}: {why}. The batch has been trained in {self.to}, and so will be the rest."
        )
        self._settle(trainer)
        return again

    def no_memory_for_retry(self, record: StepRecord) -> RuntimeError:
        """The device has no room for the batches in the higher precision."""
        if self._ranges is not None:
            self._ranges.__exit__(None, None, None)
        self._write("precision_out_of_memory", record, precision_to=self.to)
        need = f" (about {self._need / 2**30:.1f} GiB more than before)" if self._need is not None else ""
        return RuntimeError(
            f"PrecisionFallback: epoch {record.epoch}, batch {record.batch_idx} is not finite in 16 bits and does not"
            f" fit into memory in {self.to}{need}. No weight has been changed by it and the last checkpoint"
            " stands: resume from it with a smaller batch and more accumulation, or with precision=bf16-mixed."
        )

    def cannot_retry(self, record: StepRecord, why: str) -> None:
        """Change from the next step on."""
        assert self._runtime is not None
        low = str(self._runtime.trainer.precision)
        self._change_next = True
        self._fallen_from = low
        why_changed = self._reason(record)
        self._write(
            "precision_changed", record, precision_from=low, precision_to=self.to, why=why_changed, retried=False
        )
        rank_zero_warn(
            f"PrecisionFallback: {low} cannot go on at epoch {record.epoch}, batch {record.batch_idx}, global step"
            f" {record.step}: {why_changed}. Training goes on in {self.to}, but this batch is not trained again: {why}."
        )

    def _reason(self, record: StepRecord) -> str:
        if not record.loss_finite or record.bad_loss_ranks:
            return f"the loss was {record.loss if record.loss is not None else 'not finite'}"
        if record.skipped_by == "GradScaler":
            return f"gradients overflow at every loss scale, which has fallen to {record.loss_scale:g}"
        return f"a gradient was {record.gradients} while the loss was finite"

    # The change.

    def _raise_precision(self, trainer: Any) -> None:
        assert self._runtime is not None
        self._low_plugin = trainer.precision_plugin
        if hasattr(self._low_plugin, "_desired_input_dtype"):
            self._wider = WiderWeights(trainer)
            self._wider.widen()
        self._runtime.use_plugin(make_plugin(trainer, self.to))

    def _lower_precision(self, trainer: Any) -> None:
        assert self._runtime is not None
        if self._wider is not None:
            self._wider.narrow()
        self._runtime.use_plugin(self._low_plugin)

    def _settle(self, trainer: Any) -> None:
        """The change stays."""
        assert self._runtime is not None
        self._low_plugin = self._wider = None
        self._runtime.retries_are_over()
        self._log_precision(trainer)

    def _log_precision(self, trainer: Any) -> None:
        if self._runtime is not None and trainer.is_global_zero:
            for logger in trainer.loggers:
                bits = float(BITS[str(trainer.precision)])
                logger.log_metrics({"precision_bits": bits}, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _write(self, event: str, record: StepRecord, **details: Any) -> None:
        assert self._runtime is not None
        if self._runtime.trainer.is_global_zero:
            self._runtime.events.write(event, record.step, record.epoch, batch_idx=record.batch_idx, **details)

    def _objection(self, trainer: Any) -> str | None:
        """Why this Trainer's precision cannot be changed; None if it can."""
        strategy, plugin = type(trainer.strategy).__name__, type(trainer.precision_plugin).__name__
        if not is_instance_by_name(trainer.strategy, *_STRATEGIES):
            return (
                f"PrecisionFallback cannot change the precision under {strategy}, whose parameters carry it from"
                " set-up. Use DDP or a single device, or train in bf16-mixed or 32-true from the start."
            )
        if plugin not in ("MixedPrecision", "HalfPrecision"):
            return (
                f"PrecisionFallback does not know how to leave {plugin}; expected Lightning's MixedPrecision or"
                " HalfPrecision."
            )
        if plugin == "HalfPrecision" and trainer.world_size > 1:
            return (
                f"PrecisionFallback cannot leave {trainer.precision} under {strategy}: DDP's buckets are made for fp16"
                " gradients. Use 16-mixed, whose weights are fp32."
            )
        return None

    def __getstate__(self) -> dict[str, Any]:
        gone = {"_low_plugin": None, "_wider": None, "_ranges": None}
        return {**super().__getstate__(), **gone}


def extra_memory(trainer: Any) -> float:
    """About how many bytes fp32 needs more than the 16-bit precision of a step that has just been trained.

    Activations double; with 16-bit weights, so do weights, gradients and optimizer states.

    Args:
        trainer: A Trainer on a CUDA device, after its first step.
    """
    device = trainer.strategy.root_device
    held = list(trainer.lightning_module.parameters())
    held += [p.grad for p in held if p.grad is not None]
    held += [v for o in trainer.optimizers for s in o.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    at_rest = sum(tensor.numel() * tensor.element_size() for tensor in held if tensor.device == device)
    halves = sum(tensor.numel() * 2 for tensor in held if tensor.device == device and tensor.element_size() == 2)
    return float(max(torch.cuda.max_memory_allocated(device) - at_rest, 0) + halves)


def free_memory(device: torch.device) -> float:
    """Bytes of a CUDA device that torch could still use.

    Args:
        device: The device.
    """
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
