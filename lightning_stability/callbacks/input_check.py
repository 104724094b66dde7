"""InputCheck: looks at the numbers that really flow in, before they hurt."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from lightning_stability._compat import MisconfigurationException, is_instance_by_name
from lightning_stability.callbacks.base import RuntimeCallback, warn_always
from lightning_stability.checkpointing.loaders import training_iterator
from lightning_stability.checkpointing.sample_indices import SampleIndices
from lightning_stability.flagged_inputs import FILE_NAME, FlaggedInput, append_flagged
from lightning_stability.health import LateReads, StepRecord
from lightning_stability.health.input_findings import (
    Finding,
    Ranges,
    constant_by_design,
    findings_of,
    key_of,
    small_members,
)
from lightning_stability.health.inputs import FIELDS, InputMeter, TensorLook
from lightning_stability.health.late_reads import Array
from lightning_stability.runtime import logger_step

Action = Literal["warn", "skip", "raise"]
_ACTIONS = ("warn", "skip", "raise")
MOST_WARNINGS = 6
MOST_SAMPLES = 16  # of one finding that are named
_ROWS_TOGETHER = 8  # that travel from a device to the host


class InputError(RuntimeError):
    """Raised by `InputCheck(action="raise")`, on all ranks; the process then ends with a non-zero status.

    Attributes:
        reason: `"nonfinite"`, `"max_abs"`, `"constant"` or `"scale"`; empty on a rank whose own batch was fine.
        tensor: Where it is in the batch, such as `"batch['eeg']"`; empty on a rank whose own batch was fine.
        step: Optimizer steps completed before (`trainer.global_step`).
        epoch: The epoch.
        batch_idx: The batch in that epoch.
        rank: The global rank whose batch it is.
        sample: Position in the batch of the worst sample; -1 if no single one is at fault.
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


class InputCheck(RuntimeCallback):
    """Looks at every floating tensor of a training batch, on its device, before it is trained on.

    A batch is flagged if one of its tensors, whatever their nesting,

    - holds a value that is not finite;
    - has a magnitude above `max_abs`;
    - has a channel (dimension 1) that is constant over all samples and positions, though it varied in every batch
      before; each channel is flagged once, and one that is constant in the first batch is named at the start instead;
    - has a deviation that differs by more than `max_scale_ratio` from that of the earlier batches that were not
      flagged (their geometric mean).

    Tensors with fewer than two dimensions are looked at for the first two alone; integers and bool not at all. In
    16-true it is the batch before the cast to fp16, where its data loader left it; in every other precision the one
    that `training_step` gets, after `on_after_batch_transfer`.

    What a flagged batch is named by: its index, its rank, the samples' positions in it, their index in the dataset
    where the sampler tells it, and what a method `describe_sample(batch, index) -> str` of the LightningDataModule or
    the LightningModule says. When that is called the batch is gone: it gets the batch's nesting with the labels, ids
    and names that it held, and None for its large tensors.

    With `"warn"` nothing waits for the device. With `"skip"` the device discards the update of the batch's whole
    accumulation window, and gives back what its forward pass wrote, without a read of its own; with `"raise"` the
    host reads one number per batch. Both make one small all-reduce per batch where several processes train together.

    Each kind of finding is warned of once for each tensor, later ones are counted. Every flagged batch is a line in
    `events.jsonl` in the log folder; with `"skip"`, the flagged samples are rows in `flagged_inputs.csv` there.

    Logged every `log_every_n_steps` steps, of one batch:

    | key | meaning |
    |---|---|
    | `input/abs_max` | the largest magnitude of its finite values |
    | `input/std` | their deviation |
    | `input/<name>/abs_max`, `input/<name>/std` | the same, where a batch holds several floating tensors |

    Args:
        max_abs: The largest magnitude that is fine; None for any.
        max_scale_ratio: The largest ratio, either way, of a batch's deviation to the usual one.
        action: What becomes of a flagged batch: `"warn"` trains on it, `"skip"` discards its update, `"raise"` raises
            `InputError` before it is trained on.
        every_n_steps: Look at every n-th batch. (Batches, not optimizer steps: with accumulation one of these takes
            several.)

    Raises:
        MisconfigurationException: If an option is out of range; at setup, under FSDP1, DeepSpeed and XLA.
        InputError: With `action="raise"`.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> from lightning_stability import InputCheck
        >>> trainer = Trainer(max_steps=100, callbacks=[InputCheck(max_abs=1e3, action="skip")], logger=False)
    """

    def __init__(
        self,
        max_abs: float | None = None,
        max_scale_ratio: float = 100.0,
        action: Action = "warn",
        every_n_steps: int = 1,
    ) -> None:
        super().__init__()
        if max_abs is not None and not max_abs > 0:
            raise MisconfigurationException(f"InputCheck(max_abs={max_abs!r}): expected a number above 0, or None.")
        if not (1 < max_scale_ratio < math.inf):
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
        self._counts = _Counts()
        self._reads = LateReads()
        self._indices = SampleIndices()
        self._first_batch = True
        self._indices_known = False
        self._epoch_begins = True
        self._logged = 0  # log intervals begun so far
        self._warned: set[tuple[str, str]] = set()
        self._describes = True
        self._newest: tuple[_Seen, list[Finding]] | None = None

    # A fit.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the Trainer's runtime; what an earlier fit saw was that fit's."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._clear()  # a checkpoint's state is loaded after this
            on_device = trainer.strategy.root_device.type == "cuda"
            self._reads = LateReads(_ROWS_TOGETHER if on_device else 1)
            self._indices.start()  # before the data loaders' iterators are made

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Go on with the log interval that the run is in."""
        super().on_train_start(trainer, pl_module)
        self._logged = logger_step(trainer) // trainer.log_every_n_steps if trainer.log_every_n_steps else 0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """The sampler begins anew."""
        super().on_train_epoch_start(trainer, pl_module)
        self._epoch_begins = True

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Look at the batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._runtime is None or self._is_hidden(trainer):
            return
        indices = self._take_indices(trainer, batch_idx)
        if self._first_batch:
            self._first_batch = False
            self._look_at_layers(trainer, pl_module, batch, batch_idx)
        if (trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1) % self.every_n_steps == 0:
            self._look(trainer, batch, batch_idx, indices)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Hand over what has arrived."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._reads.poll()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Read what is on its way."""
        super().on_train_epoch_end(trainer, pl_module)
        self._reads.drain()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Read what is on its way, and say what was seen."""
        super().on_train_end(trainer, pl_module)
        self._reads.drain()
        self._summarise(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Read what is on its way, which may say why, and leave."""
        if self._runtime is not None:
            with contextlib.suppress(RuntimeError):  # a device that failed must not hide what made it fail
                self._reads.drain()
        super().on_exception(trainer, pl_module, exception)

    def state_dict(self) -> dict[str, Any]:
        """The usual scales, which channels varied, and the counts; in a distributed run those of rank 0."""
        self._reads.drain()
        return {"inputs": self._meter.state_dict(), "counts": self._counts.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._meter.load_state_dict(state_dict["inputs"])
        self._counts = _Counts.from_state_dict(state_dict["counts"])

    def on_record(self, record: StepRecord) -> None:
        """Count the updates that were not made."""
        if record.outcome == "bad":
            self._counts.bad += 1
        if record.outcome != "rejected":
            return
        self._counts.skipped += 1
        assert self._runtime is not None
        if self._runtime.trainer.is_global_zero:
            self._runtime.events.write(
                "update_skipped",
                record.step,
                record.epoch,
                by=record.skipped_by,
                ordinary=False,
                what="input",
                why="a batch of its window was flagged",
                batch_idx=record.batch_idx,
                batches=record.batches,
                loss=record.loss,
                loss_scale=record.loss_scale,
            )

    # The look at the layers, once, at the start of the fit.

    def _look_at_layers(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """CALL SITE of `health.layer_scales.look(trainer, pl_module, batch, batch_idx, uncast, max_scale_ratio)`.

        `uncast` is `self._runtime.uncast`: the batch before a 16-true precision cast it; None in the others.
        """

    # The look at a batch.

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

    def _look(self, trainer: Any, batch: Any, batch_idx: int, indices: list[int] | None) -> None:
        assert self._runtime is not None
        uncast = self._runtime.uncast
        looks = self._meter.look(batch if uncast is None else uncast)
        seen = _Seen(
            trainer.global_step,
            trainer.current_epoch,
            batch_idx,
            logger_step(trainer),
            self._is_log_due(trainer),
            looks,
            indices,
            small_members(batch),
        )
        if looks:
            parts = [part for look in looks for part in (look.row, look.constant) if part is not None]
            device = parts[0].device
            parts = [part.to(device, non_blocking=True) for part in parts]
            self._reads.send(parts, lambda arrays: self._arrived(seen, arrays))
        if self.action != "warn":
            self._act(trainer, seen)

    def _is_log_due(self, trainer: Any) -> bool:
        """Whether this batch is the first of those looked at of a step that Lightning logs, or since."""
        if not trainer.loggers or not trainer.log_every_n_steps:
            return False
        before, self._logged = self._logged, (logger_step(trainer) + 1) // trainer.log_every_n_steps
        return self._logged > before

    def _act(self, trainer: Any, seen: _Seen) -> None:
        """Have the batch's update discarded, or raise, on all ranks alike."""
        assert self._runtime is not None
        device = trainer.strategy.root_device
        flags = [look.flag.to(device, torch.float32, non_blocking=True) for look in seen.looks]
        flags = flags or [torch.zeros((), device=device)]
        flag = flags[0] if len(flags) == 1 else torch.stack(flags).amax()
        of_ranks = flag.reshape(1)
        if trainer.world_size > 1:
            of_ranks = torch.zeros(trainer.world_size, device=device)
            of_ranks[trainer.global_rank] = flag
            dist.all_reduce(of_ranks, op=dist.ReduceOp.MAX)
        if self.action == "skip":
            self._runtime.reject_batch(of_ranks.amax())
        else:
            ranks = [rank for rank, value in enumerate(of_ranks.tolist()) if value]
            if ranks:
                self._raise(trainer, seen, ranks)

    def _raise(self, trainer: Any, seen: _Seen, ranks: list[int]) -> None:
        self._newest = None
        self._reads.drain()
        place = f"epoch {seen.epoch}, batch {seen.batch_idx}"
        if self._newest is None or trainer.global_rank not in ranks:
            message = f"InputCheck ended the run at {place}: the batch of rank {ranks[0]} was flagged, which says why."
            raise InputError(message, "", "", seen.step, seen.epoch, seen.batch_idx, ranks[0])
        _, [finding, *_] = self._newest
        raise InputError(
            f"InputCheck ended the run: {self._sentence(trainer, seen, finding)}. It was not trained on.",
            finding.reason,
            finding.tensor,
            seen.step,
            seen.epoch,
            seen.batch_idx,
            trainer.global_rank,
            finding.samples[0][0] if finding.samples else -1,
        )

    # Its numbers have arrived.

    def _arrived(self, seen: _Seen, arrays: list[Array]) -> None:
        if self._runtime is None:
            return
        trainer = self._runtime.trainer
        arrived, findings, metrics = iter(arrays), [], {}
        for look in seen.looks:
            row = next(arrived).tolist()
            self._counts.ranges.add(f"{look.name} abs_max", row[0])
            prefix = f"input/{key_of(look.name)}" if len(seen.looks) > 1 else "input"
            metrics[f"{prefix}/abs_max"] = row[0]
            if look.has_scale:
                self._counts.ranges.add(f"{look.name} std", row[1])
                metrics[f"{prefix}/std"] = row[1]
            if look.constant is not None:
                self._say_what_is_constant(look, next(arrived))
            if row[FIELDS.index("is_flagged")]:
                findings += findings_of(look, row, self.max_abs, self.max_scale_ratio)
        self._counts.looked += 1
        if seen.is_logged and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=seen.logger_step)
        if findings:
            self._newest = seen, findings
            self._report(trainer, seen, findings)

    def _say_what_is_constant(self, look: TensorLook, constant: Array) -> None:
        said = constant_by_design(look, constant.tolist())
        if said is not None:
            rank_zero_info(f"InputCheck: {said} in the first batch: taken as meant to be, and not looked at any more.")

    def _report(self, trainer: Any, seen: _Seen, findings: list[Finding]) -> None:
        assert self._runtime is not None
        self._counts.flagged += 1
        rows = []
        for finding in findings:
            self._counts.reasons[finding.reason] += 1
            for sample, value in finding.samples[:MOST_SAMPLES] or [(None, finding.value)]:
                index = seen.dataset_index(sample)
                described = None if sample is None else self._describe(trainer, seen, sample)
                place = (seen.epoch, seen.batch_idx, trainer.global_rank, sample, index, described)
                rows.append(FlaggedInput(*place, finding.tensor, finding.reason, value))
        events = self._runtime.events
        listed = [
            {name: getattr(row, name) for name in row.__slots__ if name not in ("epoch", "batch_idx", "rank")}
            for row in rows
        ]
        events.write(
            "input_flagged", seen.step, seen.epoch, batch_idx=seen.batch_idx, action=self.action, findings=listed
        )
        if self.action == "skip":
            append_flagged(None if events.path is None else events.path.parent, rows)
        for finding in findings if self.action != "raise" else ():
            self._warn_once(trainer, seen, finding)

    def _warn_once(self, trainer: Any, seen: _Seen, finding: Finding) -> None:
        kind = (finding.tensor, finding.reason)
        if kind in self._warned or len(self._warned) >= MOST_WARNINGS:
            return
        self._warned.add(kind)
        where = ""
        if self._runtime is not None and self._runtime.events.path is not None:
            where = f" and listed in {FILE_NAME if self.action == 'skip' else self._runtime.events.path.name}"
        done = "The update of its window is skipped. " if self.action == "skip" else ""
        warn_always(
            f"InputCheck: {self._sentence(trainer, seen, finding)}. {done}Further ones are counted{where}.",
            on_this_rank=True,
        )

    def _sentence(self, trainer: Any, seen: _Seen, finding: Finding) -> str:
        rank = f", rank {trainer.global_rank}" if trainer.world_size > 1 else ""
        sentence = f"epoch {seen.epoch}, batch {seen.batch_idx}{rank}: {finding.text}"
        if not finding.samples:
            return sentence
        sample = finding.samples[0][0]
        more = len(finding.samples) - 1
        known = [f"dataset index {seen.dataset_index(sample)}"] if seen.dataset_index(sample) is not None else []
        known += [described] if (described := self._describe(trainer, seen, sample)) else []
        details = f" ({'; '.join(known)})" if known else ""
        return f"{sentence}; sample {sample}{details}" + (f" and {more} more" if more else "")

    def _describe(self, trainer: Any, seen: _Seen, sample: int) -> str | None:
        for owner in (trainer.datamodule, trainer.lightning_module):
            describe = getattr(owner, "describe_sample", None)
            if describe is None or not self._describes:
                continue
            try:
                return str(describe(seen.members, sample))
            except Exception as error:  # what only names a sample must not end a run
                self._describes = False
                warn_always(f"InputCheck: {type(owner).__name__}.describe_sample failed: {error!r}", on_this_rank=True)
        return None

    def _summarise(self, trainer: Any) -> None:
        if self._runtime is None:
            return
        counts = self._counts
        looked, flagged = counts.looked, counts.flagged
        if trainer.world_size > 1:
            sums = torch.tensor([looked, flagged], device=trainer.strategy.root_device)
            dist.all_reduce(sums)
            looked, flagged = sums.tolist()
        if self.automatic and not flagged:
            return
        guarded = any(is_instance_by_name(callback, "NaNEarlyStop") for callback in trainer.callbacks)
        rank_zero_info(f"InputCheck: {looked} batches looked at, {flagged} flagged{counts.details(guarded)}.")

    def _leave(self) -> None:
        super()._leave()
        self._indices.stop()

    def __getstate__(self) -> dict[str, Any]:
        # What is on its way, and who listens to samplers, belongs to this process's fit.
        gone = {"_reads": LateReads(), "_indices": SampleIndices(), "_newest": None}
        return {**super().__getstate__(), **gone}


@dataclass(slots=True, eq=False)
class _Seen:
    """What is kept of a batch until its numbers arrive."""

    step: int
    epoch: int
    batch_idx: int
    logger_step: int
    is_logged: bool
    looks: list[TensorLook]
    indices: list[int] | None
    members: Any

    def dataset_index(self, sample: int | None) -> int | None:
        """Where a sample is in the dataset; None if that is not sure."""
        if sample is None or self.indices is None:
            return None
        sizes = {look.shape[0] for look in self.looks if look.shape}
        return self.indices[sample] if sizes == {len(self.indices)} else None


@dataclass(slots=True)
class _Counts:
    """What was seen; resumes with the run."""

    looked: int = 0
    flagged: int = 0
    skipped: int = 0
    bad: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    ranges: Ranges = field(default_factory=Ranges)

    def details(self, guarded: bool) -> str:
        parts = []
        if self.reasons:
            parts.append(" (" + ", ".join(f"{count} {reason}" for reason, count in self.reasons.items()) + ")")
        if self.skipped:
            parts.append(f"; {self.skipped} updates skipped for it")
        if self.bad and not guarded:
            parts.append(f"; {self.bad} more skipped because they were not finite")
        names = dict.fromkeys(name.rpartition(" ")[0] for name in self.ranges.state_dict())
        for name in names:
            magnitudes, deviations = self.ranges.of(f"{name} abs_max"), self.ranges.of(f"{name} std")
            for what, ends in (("largest magnitudes", magnitudes), ("deviations", deviations)):
                if ends is not None:
                    parts.append(f"; {what} of `{name}` {ends[0]:.4g} to {ends[1]:.4g}")
        return "".join(parts)

    def state_dict(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in ("looked", "flagged", "skipped", "bad")}
        return {**numbers, "reasons": dict(self.reasons), "ranges": self.ranges.state_dict()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> _Counts:
        return cls(**{**state, "reasons": Counter(state["reasons"]), "ranges": Ranges(state["ranges"])})
