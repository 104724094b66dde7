"""What SpikeRecovery does to a run's state, and how it is announced: a rewind, and single numbers restored."""

from __future__ import annotations

from typing import Any

from lightning_stability import internals
from lightning_stability.callbacks.base import warn_always
from lightning_stability.callbacks.loggers import notify_loggers
from lightning_stability.callbacks.spike_end import Trouble
from lightning_stability.callbacks.spike_messages import odd_numbers_message
from lightning_stability.recovery.snapshots import Snapshot, Snapshots
from lightning_stability.runtime import Session


def repair_numbers(session: Session, snapshots: Snapshots, where: str) -> int:
    """Restore single numbers that left all others far behind, and say which. Returns how many.

    Args:
        where: Epoch, batch and step.
    """
    restored = snapshots.restore_odd_numbers()
    if not restored:
        return 0
    trainer = session.trainer
    assert snapshots.trusted is not None
    from_step = snapshots.trusted.step
    for odd in restored if trainer.is_global_zero else ():
        session.events.write(
            "number_restored",
            trainer.global_step,
            trainer.current_epoch,
            parameter=odd.parameter,
            index=list(odd.index),
            number=odd.what,
            was=odd.was,
            restored=odd.restored,
            from_step=from_step,
        )
    text = odd_numbers_message(restored, from_step, where)
    warn_always(f"SpikeRecovery: {text}")
    step = internals.logger_step(trainer)
    notify_loggers(trainer, "Numbers restored", text, "lightning_stability/number_restored", step)
    return len(restored)


def announce_rewind(
    session: Session, trouble: Trouble, kept: Snapshot, left_out: dict[str, Any], attempts: tuple[int, int], where: str
) -> None:
    """Say that the run has gone back.

    Args:
        left_out: The batches since.
        attempts: Which rewind at this place it is, and of how many at most.
        where: Epoch, batch and step.
    """
    trainer, (attempt, most) = session.trainer, attempts
    step, epoch = trainer.global_step, trainer.current_epoch
    if trainer.is_global_zero:
        details = {"from_step": step, "to_step": kept.step, "why": trouble.why, "left_out": left_out}
        session.events.write("rewound", step, epoch, attempt=attempt, **details)
    text = (
        f"rewound to the state of global step {kept.step}, {left_out['batches']} batches are left out: {trouble.why}"
        f" ({where}). {attempt} of at most {most} rewinds at this place."
    )
    warn_always(f"SpikeRecovery: {text}")
    notify_loggers(trainer, "Rewound", text, "lightning_stability/rewound", internals.logger_step(trainer))
