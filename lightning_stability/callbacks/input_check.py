"""InputCheck: checks the numbers that flow in, before they hurt."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_stability._compat import MisconfigurationException, is_instance_by_name
from lightning_stability.callbacks.base import StabilityCallback, is_number, warn_always
from lightning_stability.callbacks.input_findings import Finding, why_nothing_is_checked
from lightning_stability.callbacks.input_report import InputReport, Seen
from lightning_stability.callbacks.layer_check import LayerCheck
from lightning_stability.checkpointing.loaders import training_iterator
from lightning_stability.checkpointing.sample_indices import SampleIndices
from lightning_stability.health import LateReads, StepRecord
from lightning_stability.health.inputs import InputMeter
from lightning_stability.health.values import small_members
from lightning_stability.internals import logger_step

Action = Literal["warn", "skip", "raise"]
_ACTIONS = ("warn", "skip", "raise")
_ROWS_TOGETHER = 8  # that travel from a device to the host


class InputError(RuntimeError):
    """Raised by `InputCheck(action="raise")`, on all ranks; the process then ends with a non-zero status.

    Attributes:
        reason: `"nonfinite"`, `"max_abs"` or `"scale"`; empty on a rank whose own batch was fine.
        tensor: Where it is in the batch, such as `"batch['eeg']"`; empty on a rank whose own batch was fine.
        step: Optimizer steps completed before (`trainer.global_step`).
        epoch: The epoch.
        batch_idx: The batch in that epoch.
        rank: The global rank whose batch it is.
        sample: Position in the batch of the worst sample; -1 if no single one is at fault.

    Example:
        >>> error = InputError("`batch[0]` holds NaN", reason="nonfinite", tensor="batch[0]", batch_idx=3, sample=1)
        >>> error.tensor, error.sample
        ('batch[0]', 1)
    """

    def __init__(
        self,
        message: str,
        reason: str = "",
        tensor: str = "",
        step: int = -1,
        epoch: int = -1,
        batch_idx: int = -1,
        rank: int = 0,
        sample: int = -1,
    ) -> None:
        # all of them, so that it can be pickled
        super().__init__(message, reason, tensor, step, epoch, batch_idx, rank, sample)
        self.reason, self.tensor, self.step, self.epoch = reason, tensor, step, epoch
        self.batch_idx, self.rank, self.sample = batch_idx, rank, sample

    def __str__(self) -> str:
        return str(self.args[0])


class InputCheck(StabilityCallback):
    """Checks every floating tensor of a training batch, on its device, before it is trained on.

    A batch is flagged if one of its tensors, in any nesting,

    - holds NaN or infinity, and at least half of the batches before held none. A mask of only 0 and -inf passes. In
      the first batch a warning names what is not finite;
    - has a magnitude above `max_abs`;
    - has a channel (dimension 1 of three or more) that is constant, and varied in every batch before. A warning says
      so once, and the batch is trained on, whatever the action;
    - has a standard deviation that differs by more than `max_scale_ratio` from that of the earlier batches.

    Tensors with fewer than two dimensions are checked for the first two reasons alone, integers and bool not at all.
    In 16-true the batch is checked before the cast to fp16, otherwise as `training_step` gets it.

    Once, in the first training step of a fit, it measures the input of every layer, after the forward pass and before
    the backward pass. It warns of layers whose input's std is above `max_scale_ratio` or below one over it, and names
    the module that multiplies. All layers are in `input_scales.csv` in the log folder.

    A flagged batch is named by its index, its rank and the samples' positions. Their index in the dataset is added if
    the sampler tells it, and what a method `describe_sample(batch, index) -> str` of the data module or the module
    says. That method gets the labels, ids and names of the batch, and None for its large tensors.

    With `"warn"` nothing waits for the device. With `"skip"` the device leaves out the update of the batch's whole
    accumulation window, and what its forward pass wrote is restored. With `"raise"` the host reads one number per
    batch. Both make one small all-reduce per batch in several processes.

    Each reason is warned of once for each tensor. Every flagged batch is a line in `events.jsonl`. With `"skip"` the
    flagged samples are rows in `flagged_inputs.csv` in the log folder.

    Logged every `log_every_n_steps` steps, of one batch:

    | key | meaning |
    |---|---|
    | `input/abs_max` | the largest magnitude of its finite values |
    | `input/std` | their standard deviation |
    | `input/<name>/abs_max`, `input/<name>/std` | the same, where a batch holds several floating tensors |

    Args:
        max_abs: The largest magnitude that is fine; None for any.
        max_scale_ratio: The largest ratio, either way, of a batch's std to the usual one, and of a layer's to 1.
        action: What becomes of a flagged batch: `"warn"` trains on it, `"skip"` discards its update, `"raise"` raises
            `InputError` before it is trained on.
        every_n_steps: Check every n-th batch. (Batches, not optimizer steps: with accumulation one of these takes
            several.)

    Raises:
        MisconfigurationException: If an option is out of range; at setup, under FSDP1, DeepSpeed and XLA.
        InputError: With `action="raise"`.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> from lightning_stability import InputCheck
        >>> trainer = Trainer(max_steps=100, callbacks=[InputCheck(max_abs=1e3, action="skip")], logger=False)
    """

    reads_batches = True

    def __init__(
        self,
        max_abs: float | None = None,
        max_scale_ratio: float = 100.0,
        action: Action = "warn",
        every_n_steps: int = 1,
    ) -> None:
        super().__init__()
        if max_abs is not None and not (is_number(max_abs) and max_abs > 0):
            raise MisconfigurationException(f"InputCheck(max_abs={max_abs!r}): expected a number above 0, or None.")
        if not (is_number(max_scale_ratio) and 1 < max_scale_ratio < math.inf):
            raise MisconfigurationException(
                f"InputCheck(max_scale_ratio={max_scale_ratio!r}): expected a finite number above 1."
            )
        if action not in _ACTIONS:
            raise MisconfigurationException(f'InputCheck(action={action!r}): expected "warn", "skip" or "raise".')
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise MisconfigurationException(
                f"InputCheck(every_n_steps={every_n_steps!r}): expected a whole number of at least 1."
            )
        self.max_abs = max_abs
        self.max_scale_ratio = max_scale_ratio
        self.action = action
        self.every_n_steps = every_n_steps
        self.guards = self.reads_steps = action == "skip"
        self._clear()

    def _clear(self) -> None:
        self._meter = InputMeter(self.max_abs, self.max_scale_ratio)
        self._report = InputReport(self.action, self.max_abs, self.max_scale_ratio)
        self._reads = LateReads()
        self._indices = SampleIndices()
        self._first_batch = True
        self._is_first_check = True
        self._on_trial: Seen | None = None  # the first batch that was checked, until its loss is known
        self._layers: LayerCheck | None = None
        self._indices_known = False
        self._epoch_begins = True
        self._logged = 0  # log intervals begun so far

    # A fit.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the Trainer's runtime; what an earlier fit saw was that fit's."""
        if stage == "fit":
            self._clear()  # a checkpoint's state is loaded after this
            on_device = trainer.strategy.root_device.type == "cuda"
            self._reads = LateReads(_ROWS_TOGETHER if on_device else 1)
            self._indices.start()  # before the data loaders' iterators are made

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Continue the log interval that the run is in."""
        self._logged = logger_step(trainer) // trainer.log_every_n_steps if trainer.log_every_n_steps else 0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """The sampler begins anew."""
        self._epoch_begins = True

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Check the batch."""
        if self.session is None or self._is_hidden(trainer):
            return
        indices = self._take_indices(trainer, batch_idx)
        if self._first_batch:
            self._first_batch = False
            self._layers = LayerCheck(trainer, self.max_scale_ratio, only_warnings=self.automatic)
            self._layers.start(self._before_cast(batch))
        if (trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1) % self.every_n_steps == 0:
            self._check(trainer, batch, batch_idx, indices)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """The first forward pass is over."""
        if pl_module.automatic_optimization:  # else there may be several in a step
            self._report_layers()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Hand over what has arrived."""
        self._report_layers()
        if self._on_trial is not None:
            self._end_trial(trainer, outputs)
        self._reads.poll()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Read what is on its way."""
        self._reads.drain()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Read what is on its way, and say what was seen."""
        self._reads.drain()
        if self.session is not None:
            self._report.summarise(self.session, only_flagged=self.automatic)

    def on_session_end(self, exception: BaseException | None) -> None:
        """Read what is on its way, which may say why."""
        for read in (self._reads.drain, partial(self._report_layers, failed=True)) if exception is not None else ():
            with contextlib.suppress(RuntimeError, OSError):  # a device that failed must not hide what made it fail
                read()
        self._let_go()

    def state_dict(self) -> dict[str, Any]:
        """The usual scales, which channels varied, and the counts; in a distributed run those of rank 0."""
        self._reads.drain()
        return {"inputs": self._meter.state_dict(), "counts": self._report.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._meter.load_state_dict(state_dict["inputs"])
        self._report.load_state_dict(state_dict["counts"])

    def on_record(self, record: StepRecord) -> None:
        """Count the updates that were made and those that were not."""
        assert self.session is not None
        if self._report.note_update(self.session, record):
            self._reads.drain()  # says what their batches were flagged for
            self._report.warn_of_skips(self.session)

    # The layers, once, at the start of the fit.

    def _report_layers(self, failed: bool = False) -> None:
        layers, self._layers = self._layers, None
        if layers is not None and self.session is not None:
            layers.finish(self.session.events, failed)

    def _before_cast(self, batch: Any) -> Any:
        """The batch as it was before a 16-true precision converted it."""
        assert self.session is not None
        return batch if self.session.uncast is None else self.session.uncast

    # A batch.

    def _is_hidden(self, trainer: Any) -> bool:
        """Whether a `training_step(dataloader_iter)` fetches its batches itself, after every hook."""
        hidden = is_instance_by_name(trainer.fit_loop._data_fetcher, "_DataLoaderIterDataFetcher")
        if hidden and self._first_batch:
            self._first_batch = False
            warn_always("InputCheck sees no batch: `training_step` takes a `dataloader_iter` and fetches them itself.")
        return hidden

    def _take_indices(self, trainer: Any, batch_idx: int) -> list[int] | None:
        """The dataset's indices of this batch; unknown in what is left of an epoch that the run was resumed in."""
        if self._epoch_begins:
            self._epoch_begins, self._indices_known = False, batch_idx == 0
        indices = self._indices.take(training_iterator(trainer))
        return indices if self._indices_known else None

    def _check(self, trainer: Any, batch: Any, batch_idx: int, indices: list[int] | None) -> None:
        measured = self._meter.measure(self._before_cast(batch))
        is_first, self._is_first_check = self._is_first_check, False
        if is_first and not measured and not self.automatic and (why := why_nothing_is_checked(batch)):
            warn_always(f"InputCheck: {why}")
        seen = Seen(
            trainer.global_step,
            trainer.current_epoch,
            batch_idx,
            logger_step(trainer),
            self._is_log_due(trainer),
            measured,
            indices,
            small_members(batch),
        )
        if measured:
            parts = [part for stats in measured for part in (stats.row, stats.constant) if part is not None]
            device = parts[0].device
            parts = [part.to(device, non_blocking=True) for part in parts]
            self._reads.send(parts, lambda arrays: self._arrived(seen, arrays))
        if self.action != "warn":
            self._act(trainer, seen)
        if self.action == "raise" and is_first:
            self._on_trial = seen

    def _arrived(self, seen: Seen, arrays: Any) -> None:
        if self.session is not None:
            self._report.arrived(self.session, seen, arrays)

    def _is_log_due(self, trainer: Any) -> bool:
        """Whether this batch is the first checked one of a step that Lightning logs, or since."""
        if not trainer.loggers or not trainer.log_every_n_steps:
            return False
        before, self._logged = self._logged, (logger_step(trainer) + 1) // trainer.log_every_n_steps
        return self._logged > before

    def _act(self, trainer: Any, seen: Seen) -> None:
        """Have the batch's update discarded, or raise, on all ranks alike."""
        assert self.session is not None
        device = trainer.strategy.root_device
        flags = [stats.flag.to(device, torch.float32, non_blocking=True) for stats in seen.stats]
        flags = flags or [torch.zeros((), device=device)]
        of_ranks = self._of_ranks(trainer, flags[0] if len(flags) == 1 else torch.stack(flags).amax())
        if self.action == "skip":
            self.session.reject_batch(of_ranks.amax(), by="InputCheck")
        elif ranks := _where(of_ranks):
            self._reads.drain()
            newest = self._report.newest
            findings = newest[1] if newest is not None and newest[0] is seen else []
            self._raise(trainer, seen, ranks, next((finding for finding in findings if finding.is_unwanted), None))

    def _of_ranks(self, trainer: Any, flag: Tensor) -> Tensor:
        """Every rank's flag, on every rank."""
        if trainer.world_size == 1:
            return flag.reshape(1)
        of_ranks = torch.zeros(trainer.world_size, device=flag.device)
        of_ranks[trainer.global_rank] = flag
        dist.all_reduce(of_ranks, op=dist.ReduceOp.MAX)
        return of_ranks

    def _end_trial(self, trainer: Any, outputs: Any) -> None:
        """What the first batch held that is not finite was taken as meant to be: its loss must be finite then."""
        seen, self._on_trial = self._on_trial, None
        assert seen is not None
        self._reads.drain()
        finding = self._report.taken_as_meant
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        hurts = finding is not None and isinstance(loss, Tensor) and not bool(torch.isfinite(loss).all())
        flag = torch.tensor(float(hurts), device=trainer.strategy.root_device)
        if ranks := _where(self._of_ranks(trainer, flag)):
            self._raise(trainer, seen, ranks, finding if hurts else None, "Its loss is not finite either")

    def _raise(
        self, trainer: Any, seen: Seen, ranks: list[int], finding: Finding | None, end: str = "It was not trained on"
    ) -> None:
        if finding is None:
            place = f"epoch {seen.epoch}, batch {seen.batch_idx}"
            message = f"InputCheck ended the run at {place}: the batch of rank {ranks[0]} was flagged, which says why."
            raise InputError(message, "", "", seen.step, seen.epoch, seen.batch_idx, ranks[0])
        raise InputError(
            f"InputCheck ended the run: {self._report.sentence(trainer, seen, finding)}. {end}.",
            finding.reason,
            finding.tensor,
            seen.step,
            seen.epoch,
            seen.batch_idx,
            trainer.global_rank,
            finding.samples[0][0] if finding.samples else -1,
        )

    def _leave_session(self) -> None:
        super()._leave_session()
        self._let_go()

    def _let_go(self) -> None:
        self._indices.stop()
        if self._layers is not None:
            self._layers.close()
            self._layers = None

    def __getstate__(self) -> dict[str, Any]:
        # What is on its way, and who listens to samplers, belongs to this process's fit.
        gone = {"_reads": LateReads(), "_indices": SampleIndices(), "_layers": None, "_on_trial": None}
        return {**super().__getstate__(), **gone}


def _where(of_ranks: Tensor) -> list[int]:
    """The ranks with a flag; waits for the device."""
    return [rank for rank, value in enumerate(of_ranks.tolist()) if value]
