"""What FractionalCheckpoint says when training starts, and of a save that it refuses."""

from __future__ import annotations

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_stability.checkpointing.loops import SavePoints
from lightning_stability.notices import warn


def warn_of_inexact_data(points: SavePoints) -> None:
    """Say once, when training starts, what of the data a resumed run will not find again."""
    data = points.data
    if data.without_position and not data.skips_by_loading:
        kinds = ", ".join(sorted({type(loader).__name__ for loader in data.without_position}))
        warn(
            f"FractionalCheckpoint: the position of a {kinds} whose data has no indices cannot be saved; a run resumed"
            " inside an epoch sees that epoch's data from the beginning. Give the dataset state_dict and"
            " load_state_dict, and use torchdata.stateful_dataloader.StatefulDataLoader, which takes the same"
            " arguments. Or have what was trained loaded once more and left out: skip_by_loading=True."
        )
    for phrase in data.unknown_orders:
        warn(
            f"FractionalCheckpoint: the order of the training data cannot be saved: {phrase}. A resumed run may see"
            " another order, also when it is resumed between two epochs. Give it state_dict and load_state_dict."
        )
    if data.delivers_as_it_likes:
        warn(
            "FractionalCheckpoint: a data loader with in_order=False delivers batches as its workers finish them. A run"
            " resumed inside an epoch may train on some of them twice, and leave out others. Take in_order out, or"
            " resume between two epochs."
        )
    if data.has_workers:
        rank_zero_info(
            "FractionalCheckpoint: random numbers drawn inside the data loader's workers are in no checkpoint."
            " Augmentation resumes exactly if it is seeded per sample, and not otherwise."
        )


def why_refused(bad: list[str]) -> str:
    """What became non-finite, and what can be done."""
    some = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
    names = [name.removeprefix("current_model_state.") for name in bad[:3]]
    return (
        f"{some} became non-finite. If that is by design, say so:"
        f" FractionalCheckpoint(allow_nonfinite={names!r}). Otherwise resume from an earlier checkpoint."
    )


def warn_of_failure(path: str, failure: str, left: int) -> None:
    """Warn of a save that failed; the one that ends the run raises instead.

    Args:
        path: Where it was to be written.
        failure: Why it was not.
        left: How many more in a row end the run; none if it has already ended.
    """
    kept = f"{path} could not be written ({failure}). The checkpoints before it are as they were"
    more = f"; training continues, and ends at {'the next failure' if left == 1 else f'{left} more failures'} in a row"
    warn(f"FractionalCheckpoint: {kept}{more if left > 0 else ''}.")
