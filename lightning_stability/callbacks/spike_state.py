"""What SpikeRecovery knows of one optimizer's steps, and what it keeps while a fit lasts."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_stability import internals
from lightning_stability._compat import is_instance_by_name
from lightning_stability.callbacks.base import SessionMember
from lightning_stability.callbacks.spike_end import ResumeAfterEnd, SpikeEnd
from lightning_stability.callbacks.spike_messages import memory_message
from lightning_stability.checkpointing.loaders import training_iterator
from lightning_stability.checkpointing.sample_indices import SampleIndices
from lightning_stability.checkpointing.snapshot import HostSnapshot
from lightning_stability.health import StepRecord
from lightning_stability.health.usual_range import UsualLoss, UsualRange
from lightning_stability.processes import free_host_memory
from lightning_stability.recovery.packing import pack, unpack
from lightning_stability.recovery.snapshots import CONFIRMED_BY, RunState, Snapshots

RECENT_STEPS = 16
"""Steps of which it counts how many were out of their range."""
HIGH, HIGH_IN_A_ROW = 1 / 3, 3
"""A loss is high that has gone so far from its level to its limit; so many in a row make the state suspicious."""
RATE_JUMP, RATE_UNHEARD_OF = 1.5, 10.0
"""A learning rate that grows by more than the first from one update to the next begins another range: a schedule that
starts again. Not so one that is so many times the largest ever used: what it does is judged by the usual range."""
FIRST_SNAPSHOT, FEWEST_STEPS, MOST_STEPS, SHARE = 25, CONFIRMED_BY, 2000, 0.01
"""Steps before the first snapshot, at least and at most between two of them; what share of the run they may cost."""
NAMED_SAMPLES = 10_000
_NO_TRAINED_STATE = ("Checkpoint", "EarlyStopping", "ProgressBar", "Session")


@dataclass
class StepRange:
    """What is usual for one optimizer's steps."""

    loss: UsualLoss
    norm: UsualRange
    recent: deque[tuple[bool, bool, bool]] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    """Of the newest steps: whether the loss was out of its range, whether it was high, and whether the step was
    skipped."""
    rate: float = 0.0
    largest_rate: float = 0.0
    on_device: tuple[float, float] = (math.inf, math.inf)

    @property
    def loss_up(self) -> int:
        return sum(up for up, _, _ in self.recent)

    @property
    def skips(self) -> int:
        return sum(skipped for _, _, skipped in self.recent)

    @property
    def skips_in_a_row(self) -> int:
        return len(list(itertools.takewhile(lambda flags: flags[2], reversed(self.recent))))

    @property
    def stays_high(self) -> bool:
        """Whether the loss is high in most of the newest steps that were skipped or had it out of its range."""
        out = [high for up, high, skipped in self.recent if up or skipped]
        return 2 * sum(out) > len(out)

    @property
    def is_suspicious(self) -> bool:
        """Whether one number of the state may have gone wrong: the first spike of a row, or the third high loss."""
        high = len(list(itertools.takewhile(lambda flags: flags[1], reversed(self.recent))))
        return self.skips_in_a_row == 1 or high == HIGH_IN_A_ROW

    def note(self, record: StepRecord, skipped: bool) -> bool:
        """Remember how a step was; whether its loss was out of its range."""
        loss = -math.inf if record.loss is None else record.loss
        is_up = loss > self.loss.limit
        self.recent.append((is_up, loss > self.loss.towards_limit(HIGH), skipped))
        return is_up

    def learn(self, record: StepRecord, loss_is_up: bool) -> None:
        """Take in the numbers of a step that was applied."""
        rate = max(record.learning_rates, default=0.0)
        if self.rate and RATE_JUMP * self.rate < rate <= RATE_UNHEARD_OF * self.largest_rate:
            self.forget()
        self.rate, self.largest_rate = rate, max(rate, self.largest_rate)
        if record.loss is not None and not loss_is_up:
            self.loss.add(record.loss)
        self.norm.add(record.total_norm)

    def forget(self) -> None:
        """Another range begins."""
        self.loss.forget()
        self.norm.forget()
        self.recent.clear()

    def state_dict(self) -> dict[str, Any]:
        rates = {"rate": self.rate, "largest_rate": self.largest_rate}
        own = {"recent": [list(flags) for flags in self.recent], **rates}
        return {"loss": self.loss.state_dict(), "norm": self.norm.state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss.load_state_dict(state["loss"])
        self.norm.load_state_dict(state["norm"])
        self.recent.extend((up, high, skipped) for up, high, skipped in state["recent"])
        self.rate, self.largest_rate = state["rate"], state["largest_rate"]


@dataclass
class SpikeFit:
    """What lasts as long as one fit."""

    indices: SampleIndices = field(default_factory=SampleIndices)
    limits: dict[int, list[Tensor]] = field(default_factory=dict)
    """By optimizer: of the norm and of the loss, on the device."""
    snapshots: Snapshots | None = None
    packs: bool = False
    end: SpikeEnd | None = None
    resume: ResumeAfterEnd = field(default_factory=ResumeAfterEnd)
    interval: int = FIRST_SNAPSHOT
    is_measured: bool = False
    taken_at: int = 0
    takes_next: bool = False
    started_at: tuple[int, float] | None = None
    is_out: bool = False
    found_in_contents: bool = False
    known_in: tuple[int, bool] | None = None
    """An epoch, and whether the samples of its batches are known."""
    batches: deque[tuple[int, int, int, list[int] | None]] = field(default_factory=deque)
    """Number, epoch, place in it and samples of each batch since the trusted snapshot."""

    def set_limits(self, optimizer: int, usual: StepRange) -> None:
        """Write what has changed to the device."""
        limits, wanted = self.limits.get(optimizer, []), (usual.norm.limit, usual.loss.limit)
        for limit, value in zip(limits, wanted, strict=False):
            if wanted != usual.on_device:
                limit.fill_(value if value < torch.finfo(limit.dtype).max else math.inf)
        usual.on_device = wanted if limits else (math.inf, math.inf)

    def make_snapshots(self, trainer: Any) -> str | None:
        """Prepare to take snapshots, unless some machine's memory has no room for them: then say so."""
        state = RunState(trainer, lambda: callbacks_with_state(trainer))
        need, free = 2 * state.nbytes(), free_host_memory()
        if trainer.strategy.reduce_boolean_decision(free is not None and need > free, all=False):
            return memory_message(need, free)
        agree = partial(trainer.strategy.reduce_boolean_decision, all=True)
        self.packs = trainer.world_size == 1  # (else a checkpoint holds what rank 0 has)
        self.snapshots = Snapshots(state, trainer.strategy.root_device, HostSnapshot, agree)
        return None

    def pack(self, usual: Iterable[StepRange]) -> dict[str, Any] | None:
        """For a checkpoint whose state may have to be left: the trusted snapshot, and the batches since."""
        snapshots, is_in_doubt = self.snapshots, any(one.skips or one.loss_up for one in usual)
        if snapshots is None or snapshots.trusted is None or not (self.packs and is_in_doubt):
            return None
        names = {parameter: name for name, parameter in snapshots.state.named_parameters()}
        return {"snapshot": pack(snapshots.trusted, names), "batches": list(self.batches)}

    def adopt(self, packed: dict[str, Any]) -> None:
        """Go back to what a checkpoint holds, if that has to be."""
        assert self.snapshots is not None
        self.snapshots.adopt(unpack(packed["snapshot"], dict(self.snapshots.state.named_parameters())))
        self.batches.extend(packed["batches"])
        self.is_out = True

    def note_batch(self, number: int, trainer: Any, batch_idx: int) -> None:
        assert self.snapshots is not None
        samples, epoch = self.indices.take(training_iterator(trainer)), trainer.current_epoch
        if self.known_in is None or self.known_in[0] != epoch:
            # (in what is left of an epoch that the run was resumed in the indices are those from its start)
            self.known_in = epoch, batch_idx == 0
        self.batches.append((number, epoch, batch_idx, samples if self.known_in[1] else None))
        trusted = self.snapshots.trusted
        while self.batches and trusted is not None and self.batches[0][0] <= trusted.batch:
            self.batches.popleft()

    def batches_since(self, number: int) -> dict[str, Any]:
        left = [batch for batch in self.batches if batch[0] > number]
        self.batches.clear()
        known = all(batch[3] is not None for batch in left)
        samples = [sample for batch in left for sample in batch[3] or ()]
        return {
            "batches": len(left),
            "first": list(left[0][1:3]) if left else None,
            "last": list(left[-1][1:3]) if left else None,
            "samples": samples[:NAMED_SAMPLES] if known else None,
        }

    def place(self, trainer: Any) -> str:
        index = internals.batch_index(trainer)
        return f"epoch {trainer.current_epoch}, batch {index}, global step {trainer.global_step}"

    def measure(self, trainer: Any, cost: float, now: float) -> None:
        """How many steps may lie between two snapshots, so that they cost no more than their share."""
        self.is_measured = True
        step, since = self.started_at or (trainer.global_step, now)
        seconds = (now - since) / max(1, trainer.global_step - step)
        steps = math.ceil(cost / (SHARE * seconds)) if seconds > 0 else MOST_STEPS
        wanted = min(max(steps, FEWEST_STEPS), MOST_STEPS)
        self.interval = int(trainer.strategy.broadcast(wanted))


def callbacks_with_state(trainer: Any) -> list[Any]:
    """Callbacks whose tensors belong to what is trained."""
    callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, SessionMember)]
    return [callback for callback in callbacks if not is_instance_by_name(callback, *_NO_TRAINED_STATE)]


COUNTS = ("spikes", "restored_numbers", "rewinds", "left_out", "_position", "_place", "_attempts", "_restored_at")
"""What SpikeRecovery keeps in a checkpoint, besides the ranges."""
