"""SpikeRecovery: a step that spikes is skipped, and a run that is ruined goes back to a state from before."""

from __future__ import annotations

import math
import time
from typing import Any, Literal

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from lightning_stability import internals
from lightning_stability.callbacks.base import StabilityCallback, warn_always
from lightning_stability.callbacks.incident import Incident
from lightning_stability.callbacks.spike_end import SpikeEnd, Trouble
from lightning_stability.callbacks.spike_messages import (
    how_far_out,
    made_nonfinite,
    spike_message,
    summary,
)
from lightning_stability.callbacks.spike_repair import announce_rewind, repair_numbers
from lightning_stability.callbacks.spike_state import COUNTS, RECENT_STEPS, SpikeFit, StepRange
from lightning_stability.health import StepRecord
from lightning_stability.health.usual_range import UsualLoss, UsualRange
from lightning_stability.recovery.snapshots import CONFIRMED_BY, Snapshot
from lightning_stability.runtime import Order, Outcome

STAYS_UP, SKIPS_IN_A_ROW = 10, 6
"""So many of `RECENT_STEPS` steps are out of their range, or so many in a row are skipped: skipping has not helped."""
PATIENCE = 2
"""So many bad updates in a row are skipped; the next one makes the run go back."""


class SpikeRecovery(StabilityCallback):
    """Skips steps that spike, and goes back to an earlier state when that does not help.

    A step spikes when its gradient norm or loss is far above what the last steps had. The limits lie on the device,
    and the step is compared with them there, so nothing waits. The update of such a step is not applied. The count
    `skipped_updates` and the events include it.

    After a spike the weights and the optimizer's state are compared with a snapshot. A single number that has left
    all others of its tensor far behind, as after a flipped bit in memory, is restored. The event `number_restored`
    names it.

    The run goes back when 6 steps in a row spike, or when the loss is out of its range in 10 of 16 steps. It also
    does when weights have become non-finite, or more than 2 updates in a row were (or as many as the `patience` of
    `NaNEarlyStop`, if that is less). It goes back to the newest trusted snapshot: one that 10 healthy steps have
    followed. Weights, buffers, optimizers, schedulers, loss scaler, metrics of the epoch and tensors of other
    callbacks are restored. Data, `global_step`, loggers and random numbers continue. The batches since are left out,
    and the event `rewound` names them. After `max_rewinds` times at the same place the run is ended, with the
    weights of the snapshot.

    Two snapshots are kept in host memory. Each is the size of the weights and the optimizer's state.

    Args:
        sigma: How many standard deviations above the median a gradient norm or a loss is a spike. The standard
            deviation is taken from quartiles, which spikes do not widen.
        window: How many of the newest applied steps say what is usual.
        every_n_steps: Steps between two snapshots; by default as few as cost less than 1 % of the run.
        max_rewinds: How often to go back without getting past the same place.
        action: `"skip"` only skips, and takes no snapshots.

    Raises:
        MisconfigurationException: If an option is out of range; when training starts, if host memory has no room for
            the snapshots, or if the optimizer cannot be guarded (LBFGS).
        NonFiniteError: When the run is ended and `NaNEarlyStop(action="raise")` is there too.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> from lightning_stability import SpikeRecovery
        >>> trainer = Trainer(max_steps=100, callbacks=[SpikeRecovery()], logger=False)
    """

    order = Order.REWIND
    guards = True

    def __init__(
        self,
        sigma: float = 8.0,
        window: int = 128,
        every_n_steps: int | None = None,
        max_rewinds: int = 3,
        action: Literal["rewind", "skip"] = "rewind",
    ) -> None:
        super().__init__()
        self._require_number(1, whole=False, sigma=sigma)
        self._require_number(16, window=window)
        self._require_number(1, max_rewinds=max_rewinds, every_n_steps=1 if every_n_steps is None else every_n_steps)
        self._require_one_of("rewind", "skip", action=action)
        self.sigma = float(sigma)
        self.window = window
        self.every_n_steps = every_n_steps
        self.max_rewinds = max_rewinds
        self.action = action
        self.patience = PATIENCE if action == "rewind" else math.inf
        self._clear()

    def _clear(self) -> None:
        self.spikes = 0  # steps that were skipped
        self.restored_numbers = 0  # as after a flipped bit
        self.rewinds = 0
        self.left_out = 0  # batches since the snapshots that were restored
        self._ranges: dict[int, StepRange] = {}
        self._position = 0  # updates that have made the state what it is
        self._place = -1  # the position at which trouble came
        self._attempts = 0  # rewinds since that place was passed
        self._restored_at = -1  # the position that the last one went back to
        self._packed: dict[str, Any] | None = None  # what a checkpoint holds to go back to
        self._fit: SpikeFit | None = None

    # A fit.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """What an earlier fit saw was that fit's."""
        if stage == "fit":
            self._clear()
            self._fit = SpikeFit()
            self._fit.indices.start()  # before the data loaders' iterators are made

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Set the limits, and see whether there is room for the snapshots."""
        fit, session, device = self._fit, self.session, trainer.strategy.root_device
        if fit is None or session is None:
            return
        for index in range(len(trainer.optimizers)):
            limits = fit.limits[index] = [torch.full((), math.inf, device=device) for _ in range(2)]
            session.set_limits(index, *limits)
            fit.set_limits(index, self._range(index))
        fit.end = SpikeEnd(trainer)
        fit.resume.start(trainer)
        objection = fit.make_snapshots(trainer) if self.action == "rewind" else None
        if objection is not None:
            self._refuse_run(trainer, objection)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note which batch it is; have a snapshot taken after it if one is due."""
        fit, session = self._fit, self.session
        if self._ending is not None and session is not None:
            self._ending.stop(session)
        if fit is None or session is None or fit.snapshots is None:
            return
        number, snapshots = internals.batch_number(trainer), fit.snapshots
        if self._packed is not None:
            fit.adopt(self._packed)
            self._packed = None
        if snapshots.trusted is None:  # (now everything is restored that a checkpoint may hold)
            self._take(number - 1, trusted=True)
        fit.note_batch(number, trainer, batch_idx)
        is_due = trainer.global_step + 1 - fit.taken_at >= (self.every_n_steps or fit.interval)
        if is_due and not (fit.takes_next or snapshots.is_waiting or session.restores_next or fit.is_out):
            fit.takes_next = True
            session.between_steps(self._take_next, restores=False)
        if not trainer.lightning_module.automatic_optimization:
            snapshots.before_update()
        fit.started_at = fit.started_at or (trainer.global_step, time.monotonic())

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """The update waits for the snapshot that is being copied."""
        if self._fit is not None and self._fit.snapshots is not None:
            self._fit.snapshots.before_update()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End the run when the batch's hooks are through, if it is to end."""
        if self._ending is not None and self.session is not None:
            self._ending.end_loops(self.session)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the loop if the run has ended."""
        if self._ending is not None and self.session is not None:
            self._ending.stop(self.session)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Non-finite weights are found before they are saved: go back, and save what was restored."""
        session, fit = self.session, self._fit
        if session is None or fit is None:
            return
        if session.restores_next and fit.found_in_contents and trainer.world_size == 1:
            session.act_between_steps()
            if self._ending is None:
                fresh = internals.dump_checkpoint(trainer, weights_only="optimizer_states" not in checkpoint)
                checkpoint.clear()
                checkpoint.update(fresh)
        if self._ending is not None and not self._ending.is_saving:
            self._ending.stop(session, inside_save=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say what became of the spikes."""
        if self.spikes or self.rewinds:
            rank_zero_info(summary(self.spikes, self.restored_numbers, self.rewinds, self.left_out))

    def on_session_end(self, exception: BaseException | None) -> None:
        """Let the loops end by themselves again."""
        fit, self._fit = self._fit, None
        if fit is not None:
            fit.indices.stop()
            if fit.end is not None:
                fit.end.restore()
            if self.session is not None:
                fit.resume.leave(self.session.trainer)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Continue right after the batch that a run was ended with."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if self._fit is not None:
            self._fit.resume.load(trainer, checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """The ranges, the counts and, while the state is in doubt, what to go back to."""
        if self.session is not None:
            self.session.drain()
        counts = {name: getattr(self, name) for name in COUNTS}
        trusted = None if self._fit is None else self._fit.pack(self._ranges.values())
        ranges = {index: usual.state_dict() for index, usual in self._ranges.items()}
        return {**counts, "trusted": trusted, "ranges": ranges}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with them."""
        for name in COUNTS:
            setattr(self, name, state_dict[name])
        self._packed = state_dict.get("trusted")
        for index, state in state_dict["ranges"].items():
            self._range(int(index)).load_state_dict(state)

    # A step.

    def on_record(self, record: StepRecord) -> None:
        """Judge the step; learn from it if it was applied."""
        fit, session = self._fit, self.session
        if fit is None or session is None or session.restores_next or self._ending is not None:
            return
        if record.outcome == Outcome.BAD:
            self._judge(record, healthy=False)
            self._on_bad_step(record)
        elif record.outcome in (Outcome.APPLIED, Outcome.SPIKE):
            self._on_finite_step(record, self._range(record.optimizer))

    def describe_skip(self, record: StepRecord) -> dict[str, Any]:
        """The numbers and the limits."""
        if record.outcome != Outcome.SPIKE:
            return super().describe_skip(record)
        usual = self._range(record.optimizer)
        details = {"loss_limit": usual.loss.limit, "grad_norm": record.total_norm, "grad_norm_limit": usual.norm.limit}
        return {"what": "spike", "why": how_far_out(record, usual.loss, usual.norm), **details}

    def _on_finite_step(self, record: StepRecord, usual: StepRange) -> None:
        assert self.session is not None
        assert self._fit is not None
        applied = record.outcome == Outcome.APPLIED
        if not applied:
            self._say_spike(record, usual)
        loss_is_up = usual.note(record, skipped=not applied)
        several = self.session.trainer.world_size > 1
        # each rank has a loss of its own: what all have to decide alike is decided by the norm
        self._judge(record, healthy=applied and (several or not loss_is_up))
        if applied:
            self._position += 1
            usual.learn(record, loss_is_up)
            self._fit.set_limits(record.optimizer, usual)
        if usual.is_suspicious:
            self.session.between_steps(self._repair, restores=False)
        # (a state that was healthy and makes no good step since it was restored: the data have changed)
        is_of_data = self._attempts > 0 and self._position == self._restored_at
        can_go_back = self.action == "rewind" and not is_of_data
        # (the ranks count the same skips)
        is_out = max(usual.skips, 0 if several else usual.loss_up) >= STAYS_UP
        if not is_out and not (can_go_back and usual.skips_in_a_row >= SKIPS_IN_A_ROW):
            return
        is_up = usual.stays_high
        if several:
            is_up = self.session.trainer.strategy.reduce_boolean_decision(is_up, all=False)
        if is_up and can_go_back:
            up = f"{usual.skips} of the last {len(usual.recent)} steps spiked, in {usual.loss_up} by their loss"
            self._go_back("spike", f"{up}: {how_far_out(record, usual.loss, usual.norm)}", record)
        elif is_out:  # it is no spike but another level
            usual.forget()
            self._fit.set_limits(record.optimizer, usual)
            warn_always(
                f"SpikeRecovery: {STAYS_UP} steps of at most {RECENT_STEPS} were beyond the usual range (epoch"
                f" {record.epoch}, global step {record.step}). The new level is taken for the usual one from now on."
            )

    def _say_spike(self, record: StepRecord, usual: StepRange) -> None:
        self.spikes += 1
        if not usual.skips:  # the first of several
            warn_always(spike_message(record, usual.loss, usual.norm))

    def _on_bad_step(self, record: StepRecord) -> None:
        session = self.session
        assert session is not None
        in_a_row = session.counts.bad_in_a_row[record.optimizer]
        if self.action == "skip":
            return
        lost = record.not_restored
        if session.trainer.strategy.reduce_boolean_decision(bool(lost), all=False):
            lost = lost or ["a parameter or buffer of another rank"]
            self._go_back("weight", made_nonfinite(lost, session.trainer), record)
        elif in_a_row == 1 <= session.dispatch.patience:
            session.between_steps(self._repair, restores=False)
        elif in_a_row > session.dispatch.patience:
            incident = Incident.of(record, session.recent_batch(record), session.trainer.world_size > 1)
            self._go_back(incident.what, f"{in_a_row} updates in a row were skipped: {incident.why}", record)

    def on_nonfinite_contents(self, restored: list[str], lost: list[str], all_ranks: bool) -> None:
        """Weights became non-finite, and no step since has shown it."""
        session, fit = self.session, self._fit
        if session is None or fit is None or session.restores_next or self._ending is not None:
            return
        if not lost or not all_ranks or self.action == "skip":
            return
        fit.found_in_contents = True
        self._go_back("weight", made_nonfinite(lost, session.trainer))

    @property
    def _ending(self) -> SpikeEnd | None:
        end = None if self._fit is None else self._fit.end
        return end if end is not None and end.is_due else None

    def _judge(self, record: StepRecord, healthy: bool) -> None:
        assert self._fit is not None
        self._fit.is_out = not healthy
        if self._fit.snapshots is not None:
            self._fit.snapshots.judge(record.step, healthy)

    def _range(self, optimizer: int) -> StepRange:
        if optimizer not in self._ranges:
            norm = UsualRange(self.sigma, self.window, of_logs=True)
            self._ranges[optimizer] = StepRange(UsualLoss(self.sigma, self.window), norm)
        return self._ranges[optimizer]

    # Going back.

    def _take_next(self) -> None:
        assert self.session is not None
        assert self._fit is not None
        self._fit.takes_next = False
        if not (self.session.restores_next or self._ending):
            self._take(internals.batch_number(self.session.trainer))

    def _take(self, batch: int, trusted: bool = False) -> None:
        session, fit = self.session, self._fit
        assert session is not None
        assert fit is not None
        assert fit.snapshots is not None
        trainer = session.trainer
        if trainer.world_size > 1 and not trusted:
            up = any(usual.loss_up >= STAYS_UP for usual in self._ranges.values())
            if trainer.strategy.reduce_boolean_decision(up, all=False):
                self._go_back("spike", f"the loss was out of its range in {STAYS_UP} steps on one rank or more")
                return
        snapshot = Snapshot(trainer.global_step, trainer.current_epoch, batch, self._position, trusted)
        started = time.monotonic()
        fit.snapshots.take(snapshot)
        fit.taken_at = trainer.global_step
        if not trusted and self.every_n_steps is None and not fit.is_measured:
            snapshot.wait()
            fit.measure(trainer, time.monotonic() - started, started)

    def _repair(self) -> None:
        """A bit may have flipped: restore single numbers that went far astray."""
        session, fit = self.session, self._fit
        if session is None or fit is None or fit.snapshots is None or session.restores_next or self._ending:
            return
        self.restored_numbers += repair_numbers(session, fit.snapshots, fit.place(session.trainer))

    def _go_back(self, what: str, why: str, record: StepRecord | None = None) -> None:
        assert self.session is not None
        trouble = Trouble(what, why, () if record is None else record.learning_rates)
        self.session.between_steps(lambda: self._rewind(trouble))

    def _rewind(self, trouble: Trouble) -> None:
        session, fit = self.session, self._fit
        assert session is not None
        assert fit is not None
        assert fit.snapshots is not None
        trainer = session.trainer
        if self._position > self._place + CONFIRMED_BY:
            self._attempts = 0
        self._place = max(self._position, self._place)
        kept = fit.snapshots.restore(trainer.current_epoch)
        self._position = self._restored_at = kept.position
        fit.is_out = fit.found_in_contents = False
        fit.taken_at = trainer.global_step
        for usual in self._ranges.values():
            usual.recent.clear()
        if self._attempts >= self.max_rewinds:
            assert fit.end is not None
            fit.end.begin(trouble, fit.place(trainer), kept.step, self.rewinds, self._attempts, kept.position > 0)
            session.end()
            return
        self._attempts += 1
        self.rewinds += 1
        batches = fit.batches_since(kept.batch)
        self.left_out += batches["batches"]
        announce_rewind(session, trouble, kept, batches, (self._attempts, self.max_rewinds), fit.place(trainer))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_fit": None}
