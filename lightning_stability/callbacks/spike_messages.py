"""What SpikeRecovery says."""

from __future__ import annotations

from typing import Any

from lightning_stability.callbacks.incident import listed
from lightning_stability.checkpointing.stopping import resume_command
from lightning_stability.health import StepRecord
from lightning_stability.health.usual_range import UsualLoss, UsualRange
from lightning_stability.recovery.odd_numbers import OddNumber
from lightning_stability.runtime.counts import Counts


def how_far_out(record: StepRecord, loss: UsualLoss, norm: UsualRange) -> str:
    """Which of a step's numbers are beyond their limits."""
    parts = []
    if record.loss is not None and record.loss > loss.limit:
        parts.append(f"the loss was {record.loss:.4g} (usual {loss.level:.4g}, limit {loss.limit:.4g})")
    if record.total_norm > norm.limit:
        parts.append(f"the gradient norm was {record.total_norm:.4g} (usual {norm.level:.4g}, limit {norm.limit:.4g})")
    if not parts:  # the limits have moved since
        parts.append(f"the gradient norm was {record.total_norm:.4g}, beyond the limit of that moment")
    return ", ".join(parts)


def spike_message(record: StepRecord, loss: UsualLoss, norm: UsualRange) -> str:
    """A step was skipped."""
    where = f"epoch {record.epoch}, batch {record.batch_idx}, global step {record.step}"
    return f"SpikeRecovery: an update was skipped: {how_far_out(record, loss, norm)} ({where})."


def made_nonfinite(names: list[str], trainer: Any) -> str:
    """Weights that are non-finite, and the optimizer that trains the first of them."""
    first = dict(trainer.lightning_module.named_parameters()).get(names[0])
    optimizer = ""
    for candidate in trainer.optimizers:
        for group in candidate.param_groups:
            if first is not None and any(parameter is first for parameter in group["params"]):
                shown = [f"{n}={group[n]:g}" for n in ("lr", "eps") if isinstance(group.get(n), (int, float))]
                optimizer = f", trained by {type(candidate).__name__}({', '.join(shown)}),"
    is_one = len(names) == 1
    made = f"an update made {'it' if is_one else 'them'} so, or code outside of the optimizer"
    return f"{listed(names)}{optimizer} {'is' if is_one else 'are'} not finite: {made}"


def summary(spikes: int, restored_numbers: int, rewinds: int, left_out: int) -> str:
    """What became of a run's spikes."""
    restored = f"{restored_numbers} single numbers restored, " if restored_numbers else ""
    return f"SpikeRecovery: {spikes} steps skipped, {restored}{rewinds} rewinds, {left_out} batches left out."


def odd_numbers_message(restored: list[OddNumber], step: int, where: str) -> str:
    """Single numbers were restored.

    Args:
        step: The global step of the snapshot that they come from.
        where: Epoch, batch and step.
    """
    shown = "; ".join(
        f"{odd.what} of {odd.parameter}{list(odd.index)} had become {odd.was:.4g} and is {odd.restored:.4g} again"
        for odd in restored[:3]
    )
    more = f"; and {len(restored) - 3} more" if len(restored) > 3 else ""
    return (
        f"{shown}{more}. It alone had moved far beyond all others of its tensor, as after a flipped bit in memory. It"
        f" and what the optimizer keeps of it are those of global step {step} again ({where})."
    )


def end_message(
    why: str,
    where: str,
    attempts: int,
    to_step: int,
    rates: tuple[float, ...],
    lost: str,
    counts: Counts,
    checkpoint: str | None,
) -> str:
    """Why the run was ended, what is left, and what to type next.

    Args:
        attempts: Rewinds before it.
        to_step: The step whose state has been restored now.
        rates: Learning rates of the step; empty if it is not known.
        lost: What is non-finite even now; empty if nothing is.
        checkpoint: The last good one.
    """
    again = f"after {attempts} rewind{'s' if attempts > 1 else ''} it came again"
    lines = [f"SpikeRecovery ended the run: {why}; {again}.", f"  where: {where}"]
    if rates:
        shown = ", ".join(f"{rate:g}" for rate in dict.fromkeys(rates))
        lines.append(f"  learning rate of that step: {shown}")
    state = f"not finite: {lost}" if lost else "parameters and buffers are finite"
    lines.append(f"  restored: the state of global step {to_step}; {state}")
    lines.append(f"  updates: {counts.updates} applied, {counts.skipped} skipped")
    if checkpoint is not None:
        lines += [f"  last good checkpoint: {checkpoint}", f"  resume: {resume_command(checkpoint)}"]
    else:
        lines.append("  no ModelCheckpoint has written a checkpoint")
    return "\n".join(lines)


def memory_message(need: int, free: int | None) -> str:
    """Host memory has no room for the snapshots."""
    has = "another machine of this run has less" if free is None else f"{free / 2**30:.1f} GiB are free"
    return (
        f"SpikeRecovery: two snapshots of this run take {need / 2**30:.1f} GiB of host memory, and {has}. Free some,"
        ' or use SpikeRecovery(action="skip"), which takes none.'
    )
