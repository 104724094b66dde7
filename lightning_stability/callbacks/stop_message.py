"""What is said when a run is ended."""

from __future__ import annotations

from lightning_stability.callbacks.incident import Incident
from lightning_stability.checkpointing.stopping import resume_command
from lightning_stability.runtime import Outcome
from lightning_stability.runtime.counts import Counts


def stop_message(
    incident: Incident, origin: str | None, counts: Counts, checkpoint: str | None, patience: int, automatic: bool
) -> str:
    """What became non-finite, where, what is left, and what to type next.

    Args:
        origin: Where its first non-finite value was made, in sentences; None if that was not looked for.
        checkpoint: The last good one, which was read just now.
        patience: How many bad updates in a row are skipped.
        automatic: Whether the callback came with the environment.
    """
    lines = [f"NaNEarlyStop ended the run: {incident.why}.", f"  where: {incident.place}"]
    if origin is not None:
        lines.append(f"  origin: {origin}")
    counted = counts.outcomes.total() > 0  # (where an engine owns the update, nothing is)
    if counted:
        lines.append(f"  updates: {counts.updates} applied, {counts.skipped} skipped")
    if checkpoint is not None:
        lines += [f"  last good checkpoint: {checkpoint}", f"  resume: {resume_command(checkpoint)}"]
    elif counted and not counts.updates:
        lines.append("  no update was ever applied: there is nothing to resume from; find the cause first")
    elif not counted or incident.what == "weight":
        lines.append("  no ModelCheckpoint has written a checkpoint")
    else:
        lines.append("  no ModelCheckpoint has written a checkpoint; parameters and buffers in memory are finite")
    # (where the weights or the module's own state are the cause, skipping more batches helps nothing)
    if incident.what == "input" or (patience == 0 and incident.what in ("loss", "gradient")):
        option = f"NaNEarlyStop(patience={max(2, patience + 1)})"
        how = f"LIGHTNING_STABILITY_CALLBACKS='{option}'" if automatic else option
        lines.append(f"  to skip such batches and continue: {how}")
    if automatic:
        lines.append(
            "  lightning-stability is installed and has added it; LIGHTNING_STABILITY_CALLBACKS=none disables it"
        )
    return "\n".join(lines)


def summary(counts: Counts, first_incident: str | None, last_incident: str | None) -> str:
    """What became of all updates of a fit, without a full stop."""
    parts = [f"{counts.updates} update{'' if counts.updates == 1 else 's'}, {counts.skipped} skipped"]
    by_scaler = counts.outcomes[Outcome.ORDINARY_SKIP]
    if by_scaler:
        parts.append(f"{by_scaler} of these for a loss scale that was too high, which is ordinary")
    if first_incident:
        parts.append(f"first incident at {first_incident}, last at {last_incident}")
    return "; ".join(parts)
