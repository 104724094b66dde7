"""What SpikeRecovery says."""

from __future__ import annotations

import math
from typing import Any

from lightning_stability._compat import MisconfigurationException
from lightning_stability.callbacks.incident import listed
from lightning_stability.checkpointing.stopping import resume_command
from lightning_stability.health import StepRecord
from lightning_stability.health.usual_range import UsualRange
from lightning_stability.runtime.counts import Counts


def check_options(sigma: Any, window: Any, every_n_steps: Any, max_rewinds: Any, action: Any) -> None:
    """Refuse what SpikeRecovery cannot work with.

    Raises:
        MisconfigurationException: If an option is out of range.
    """
    if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not 1.0 <= sigma < math.inf:
        raise MisconfigurationException(
            f"SpikeRecovery(sigma={sigma!r}): expected a finite number of at least 1; 8 is usual."
        )
    numbers = {"window": (window, 16), "max_rewinds": (max_rewinds, 1)}
    if every_n_steps is not None:
        numbers["every_n_steps"] = (every_n_steps, 1)
    for name, (value, least) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise MisconfigurationException(f"SpikeRecovery({name}={value!r}): expected a whole number >= {least}.")
    if action not in ("rewind", "skip"):
        raise MisconfigurationException(f'SpikeRecovery(action={action!r}): expected "rewind" or "skip".')


def how_far_out(record: StepRecord, loss: UsualRange, norm: UsualRange) -> str:
    """Which of a step's numbers are beyond their limits."""
    parts = []
    if record.loss is not None and record.loss > loss.limit:
        parts.append(f"the loss was {record.loss:.4g} (usual {loss.level:.4g}, limit {loss.limit:.4g})")
    if record.total_norm > norm.limit:
        parts.append(f"the gradient norm was {record.total_norm:.4g} (usual {norm.level:.4g}, limit {norm.limit:.4g})")
    if not parts:  # the limits have moved since
        parts.append(f"the gradient norm was {record.total_norm:.4g}, beyond the limit of that moment")
    return ", ".join(parts)


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
        why: What happened once more.
        where: And where.
        attempts: Rewinds before it.
        to_step: The step whose state has been restored now.
        rates: Learning rates of the step; empty if it is not known.
        lost: What is non-finite even now; empty if nothing is.
        counts: What became of the updates.
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
