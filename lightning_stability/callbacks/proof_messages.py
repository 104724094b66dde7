"""What is said of a resumed run whose steps were compared with those of the run that was killed."""

from __future__ import annotations

from typing import Any

from lightning_stability.checkpointing.fingerprints import Difference


def sentence(difference: Difference | None, equal: int, compared: int, saved_at: int, rank: int | None) -> str:
    """Whether the steps were the same in every bit, or what differed first.

    Args:
        difference: The first; None if there is none.
        equal: How many steps were the same.
        compared: Of how many.
        saved_at: The global step of the save.
        rank: On which rank it was found; None where there is one.

    Example:
        >>> sentence(None, 20, 20, 100, None)
        'resumed exactly: 20 of 20 steps bitwise identical'
        >>> sentence(Difference("data", 3, "data", "00", "01"), 2, 20, 100, None)
        'other data: step 103 was trained on another batch than before; 2 of 20 steps bitwise identical'
    """
    if difference is None:
        return f"resumed exactly: {equal} of {compared} steps bitwise identical"
    said = _what(difference, saved_at + difference.n, saved_at)
    if rank is not None:
        said += f", on rank {rank}"
    if compared:
        said += f"; {equal} of {compared} steps bitwise identical"
    if difference.changed:
        said += f". Changed since: {', '.join(difference.changed)}"
    elif difference.kind in ("numerics", "computation"):
        said += ". Device, versions and flags are the same: an operation that is not deterministic, a faulty device"
        said += ", or random numbers drawn elsewhere" if difference.kind == "computation" else ""
    return said


def not_compared(what: str) -> str:
    """Why nothing is said of the steps after a resume.

    Example:
        >>> not_compared("the batch size was 4 and is 7").rpartition(", ")[2]
        'which took other batches: the batch size was 4 and is 7'
    """
    return f"the steps after this resume are not compared with those of before, which took other batches: {what}"


def as_event(
    difference: Difference | None, equal: int, compared: int, said: str, rank: int | None
) -> tuple[str, dict[str, Any]]:
    """The event's name, and what it says."""
    details: dict[str, Any] = {"steps": compared, "equal": equal, "why": said}
    if difference is None:
        return "resume_verified", details
    details |= {"kind": difference.kind, "first": difference.n, "was": difference.was, "now": difference.now}
    details |= {"changed": list(difference.changed)} | ({} if rank is None else {"on_rank": rank})
    return "resume_differs", details


def _what(found: Difference, step: int, saved_at: int) -> str:
    if found.kind == "data":
        return f"other data: step {step} was trained on another batch than before"
    if found.kind == "weights":
        return f"other weights: those loaded are not those saved at step {saved_at}"
    if found.kind == "optimizer state":
        return f"other optimizer state: the one loaded is not the one saved at step {saved_at}"
    if found.kind in ("learning rate", "loss scale"):
        return (
            f"other hyperparameters: {found.kind} {_short(found.was)} before, {_short(found.now)} now, at step {step}"
        )
    growth = ""
    if found.ratio is not None:
        first, last = found.ratio
        growth = f", a relative difference of {first:.1e}"
        growth += f" that grows to {last:.1e}" if last > first else ""
    name = {"loss": "the loss", "bits": "a batch's loss", "norm": "the gradients' norm"}[found.field]
    values = "" if found.field == "bits" else f": {_short(found.was)} before, {_short(found.now)} now"
    same = "weights, data and learning rate are the same"
    kind = "numerics" if found.kind == "numerics" else "computation"
    return f"other {kind}: {same}, {name} of step {step} is not{values}{growth}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_short, value[:3])) + (", ..." if len(value) > 3 else "")
    return f"{value:.9g}" if isinstance(value, float) else str(value)[:40]
