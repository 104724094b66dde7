"""What InputCheck says and writes of the batches that it has checked, once their numbers are on the host."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from lightning_stability._compat import is_instance_by_name
from lightning_stability.callbacks.base import warn_always
from lightning_stability.callbacks.input_findings import (
    Finding,
    constant_by_design,
    findings_of,
    key_of,
    nonfinite_by_design,
)
from lightning_stability.events import EventLog, warn_once_of
from lightning_stability.flagged_inputs import FILE_NAME, FlaggedInput, append_flagged
from lightning_stability.health import StepRecord
from lightning_stability.health.input_rules import FIELDS
from lightning_stability.health.inputs import TensorStats
from lightning_stability.health.late_reads import Array
from lightning_stability.runtime import Session

MOST_WARNINGS = 6
MOST_SAMPLES = 16  # of one finding that are named
LONGEST_STREAK = 8
"""Updates skipped in a row that are warned of."""
_REMEDIES = {
    "nonfinite": "put finite values in the place of what is missing and give the model a mask",
    "max_abs": "raise max_abs",
    "scale": "raise max_scale_ratio",
}


@dataclass(slots=True, eq=False)
class Seen:
    """What is kept of a batch until its numbers arrive."""

    step: int
    epoch: int
    batch_idx: int
    logger_step: int
    is_logged: bool
    stats: list[TensorStats]
    indices: list[int] | None
    members: Any

    def dataset_index(self, sample: int | None) -> int | None:
        """Where a sample is in the dataset; None if that is not sure."""
        if sample is None or self.indices is None:
            return None
        sizes = {stats.shape[0] for stats in self.stats if stats.shape}
        return self.indices[sample] if sizes == {len(self.indices)} else None


class InputReport:
    """Counts, logs, lists and warns.

    Attributes:
        newest: The last batch that was flagged, and for what.
        taken_as_meant: The first tensor whose values that are not finite were taken as meant to be.
    """

    def __init__(self, action: str, max_abs: float | None, max_scale_ratio: float) -> None:
        self._action = action
        self._max_abs = max_abs
        self._max_scale_ratio = max_scale_ratio
        self._counts = _Counts()
        self._updates = _Updates()
        self._warned: set[tuple[str, str]] = set()
        self._describes = True
        self.newest: tuple[Seen, list[Finding]] | None = None
        self.taken_as_meant: Finding | None = None

    def arrived(self, runtime: Session, seen: Seen, arrays: list[Array]) -> None:
        """A batch's numbers are there."""
        trainer = runtime.trainer
        arrived, findings, metrics = iter(arrays), [], {}
        for stats in seen.stats:
            row = next(arrived).tolist()
            self._counts.widen(f"{stats.name} abs_max", row[0])
            prefix = f"input/{key_of(stats.name)}" if len(seen.stats) > 1 else "input"
            metrics[f"{prefix}/abs_max"] = row[0]
            if stats.has_scale:
                self._counts.widen(f"{stats.name} std", row[1])
                metrics[f"{prefix}/std"] = row[1]
            if stats.constant is not None and (said := constant_by_design(stats, next(arrived).tolist())):
                rank_zero_info(
                    f"InputCheck: {said} in the first batch: taken as meant to be, and not looked at any more."
                )
            if row[FIELDS.index("nonfinite")] and (stats.name, "by design") not in self._warned:
                self._take_as_meant(trainer, seen, stats, nonfinite_by_design(stats, row))
            if row[FIELDS.index("is_unwanted")] or row[FIELDS.index("is_constant")]:
                findings += findings_of(stats, row, self._max_abs, self._max_scale_ratio)
        self._counts.looked += 1
        if seen.is_logged and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=seen.logger_step)
        if findings:
            self.newest = seen, findings
            self._report(runtime, seen, findings)

    def _take_as_meant(self, trainer: Any, seen: Seen, stats: TensorStats, finding: Finding | None) -> None:
        if finding is None:
            return
        self._warned.add((finding.tensor, "by design"))
        self.taken_as_meant = self.taken_as_meant or finding
        if sum(kind == "by design" for _, kind in self._warned) > MOST_WARNINGS:
            return
        why = "It is the first batch looked at" if stats.is_first else "Most batches before held such"
        warn_always(
            f"InputCheck: {self.sentence(trainer, seen, finding)}. {why}, so that this is taken as meant to be: such"
            " values are flagged only while half of the batches or more hold none. If it is not meant, mend that data.",
            on_this_rank=True,
        )

    def _report(self, runtime: Session, seen: Seen, findings: list[Finding]) -> None:
        trainer, events = runtime.trainer, runtime.events
        self._counts.flagged += 1
        rows = []
        unwanted = any(finding.is_unwanted for finding in findings)
        for finding in findings:
            self._counts.reasons[finding.reason] += 1
            if finding.is_unwanted:
                self._updates.flagged[finding.tensor, finding.reason] += 1
            for sample, value in finding.samples[:MOST_SAMPLES] or [(None, finding.value)]:
                index = seen.dataset_index(sample)
                described = None if sample is None else self._describe(trainer, seen, sample)
                place = (seen.epoch, seen.batch_idx, trainer.global_rank, sample, index, described)
                rows.append(FlaggedInput(*place, finding.tensor, finding.reason, value))
        listed = [
            {name: getattr(row, name) for name in row.__slots__ if name not in ("epoch", "batch_idx", "rank")}
            for row in rows
        ]
        action = self._action if unwanted else "warn"
        events.write("input_flagged", seen.step, seen.epoch, batch_idx=seen.batch_idx, action=action, findings=listed)
        if action == "skip":
            self._append_rows(events, rows)
        for finding in findings if action != "raise" else ():
            self._warn_once(runtime, seen, finding, action)

    @staticmethod
    def _append_rows(events: EventLog, rows: list[FlaggedInput]) -> None:
        if events.path is None:
            return
        try:
            append_flagged(events.path.parent, rows)
        except OSError as error:  # the run goes before its record
            warn_once_of(events.path.with_name(FILE_NAME), error)

    def _warn_once(self, runtime: Session, seen: Seen, finding: Finding, action: str) -> None:
        kind = (finding.tensor, finding.reason)
        if kind in self._warned or sum(kind != "by design" for _, kind in self._warned) >= MOST_WARNINGS:
            return
        self._warned.add(kind)
        where, path = "", runtime.events.path
        if path is not None:
            where = f" and listed in {FILE_NAME if action == 'skip' else path.name}"
        done = "The update of its window is skipped. " if action == "skip" else ""
        warn_always(
            f"InputCheck: {self.sentence(runtime.trainer, seen, finding)}. {done}Further ones are counted{where}.",
            on_this_rank=True,
        )

    def sentence(self, trainer: Any, seen: Seen, finding: Finding) -> str:
        """What is wrong with which batch, and which sample is the worst."""
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

    def _describe(self, trainer: Any, seen: Seen, sample: int) -> str | None:
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

    # The updates.

    def note_update(self, runtime: Session, record: StepRecord) -> bool:
        """Count an update; returns whether so many in a row were skipped by now that `warn_of_skips` is due."""
        if record.outcome == "bad":
            self._counts.bad += 1
        self._updates.add(record.outcome)
        if record.outcome != "rejected":
            return False
        self._counts.skipped += 1
        return self._updates.streak == LONGEST_STREAK

    def warn_of_skips(self, runtime: Session) -> None:
        """Nothing is learnt: say so once, on the ranks whose batches were flagged, and what to do."""
        updates = self._updates
        if updates.warned_of or not updates.flagged:
            return
        updates.warned_of = True
        [((tensor, reason), count)] = updates.flagged.most_common(1)
        row = "update was" if updates.streak == 1 else f"{updates.streak} updates were"
        none = "" if updates.made else " and none of this fit was made"
        listed = "" if runtime.events.path is None else f", or leave out what {FILE_NAME} lists"
        warn_always(
            f"InputCheck: the last {row} skipped because of what went in{none}; flagged most: `{tensor}` ({reason}, in"
            f" {_counted(count, 'batch')}). Nothing is learnt from skipped updates. If that data is as it should be,"
            f' {_REMEDIES[reason]}, or take action="warn"; if not, mend it{listed}.',
            on_this_rank=True,
        )

    def summarise(self, runtime: Session, only_flagged: bool) -> None:
        """Say at the end of a fit what was seen."""
        trainer, counts = runtime.trainer, self._counts
        if self._updates.streak and not self._updates.made:
            self.warn_of_skips(runtime)
        looked, flagged = counts.looked, counts.flagged
        on_this = " on this rank" if not runtime.all_end_epochs_at_once else ""
        if trainer.world_size > 1 and not on_this:
            sums = torch.tensor([looked, flagged], device=trainer.strategy.root_device)
            dist.all_reduce(sums)
            looked, flagged = sums.tolist()
        if only_flagged and not flagged:
            return
        guarded = any(is_instance_by_name(callback, "NaNEarlyStop") for callback in trainer.callbacks)
        seen = f"{_counted(looked, 'batch')} looked at{on_this}, {flagged} flagged"
        rank_zero_info(f"InputCheck: {seen}{counts.details(guarded)}.")

    # Resuming and copies.

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {**asdict(self._counts), "reasons": dict(self._counts.reasons)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._counts = _Counts.from_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "newest": None}  # which holds a batch's labels, and tensors on a device


def _counted(count: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{count} {noun if count == 1 else plural}"


@dataclass(slots=True)
class _Updates:
    """The updates of this fit, and what its batches were flagged for."""

    made: int = 0
    streak: int = 0  # that were skipped for their inputs since one was made
    warned_of: bool = False
    flagged: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, outcome: str) -> None:
        if outcome == "rejected":
            self.streak += 1
        elif outcome == "applied":
            self.made += 1
            self.streak = 0


@dataclass(slots=True)
class _Counts:
    """What was seen; resumes with the run."""

    looked: int = 0
    flagged: int = 0
    skipped: int = 0
    bad: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    ranges: dict[str, list[float]] = field(default_factory=dict)  # least and largest

    def widen(self, name: str, value: float) -> None:
        """See a number; one that is not finite is passed over."""
        if math.isfinite(value):
            least, largest = self.ranges.get(name, (value, value))
            self.ranges[name] = [min(least, value), max(largest, value)]

    def details(self, guarded: bool) -> str:
        parts = []
        if self.reasons:
            parts.append(" (" + ", ".join(f"{count} {reason}" for reason, count in self.reasons.items()) + ")")
        if self.skipped:
            parts.append(f"; {_counted(self.skipped, 'update')} skipped for that")
        if self.bad and not guarded:
            them = "it was" if self.bad == 1 else "they were"
            parts.append(f"; {_counted(self.bad, 'update')} skipped because {them} not finite")
        for name in dict.fromkeys(name.rpartition(" ")[0] for name in self.ranges):
            for what, key in (("largest magnitudes", "abs_max"), ("std", "std")):
                if ends := self.ranges.get(f"{name} {key}"):
                    parts.append(f"; {what} of `{name}` {ends[0]:.4g} to {ends[1]:.4g}")
        return "".join(parts)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> _Counts:
        return cls(**{**state, "reasons": Counter(state["reasons"])})
