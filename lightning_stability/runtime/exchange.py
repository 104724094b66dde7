"""What ranks tell each other about a bad step, without a collective that one of them might not enter."""

from __future__ import annotations

import datetime
import itertools
from typing import Any

from lightning_stability.internals import abort_collectives, default_store
from lightning_stability.runtime.policies import DeliberateError

TIMEOUT = datetime.timedelta(seconds=20)
"""Ranks reach the same step within the time of one step: their gradients are reduced together."""

_EXCHANGES = itertools.count()  # of this process; equal on all ranks as long as they see the same events


class RanksDisagreeError(DeliberateError, RuntimeError):
    """A step was bad on this rank and not on others: their weights are no longer the same."""


def exchange_flags(key: str, flag: bool, trainer: Any) -> list[bool]:
    """Every rank's flag about one event that all ranks should have seen.

    It goes through the key-value store of the process group. A rank that does not answer ends the run on this rank,
    instead of a collective that never returns.

    Args:
        key: The event, the same on all ranks.

    Raises:
        RanksDisagreeError: If another rank has not seen the event.
    """
    store, ranks = default_store(), range(trainer.world_size)
    number = next(_EXCHANGES)
    keys = [f"lightning_stability/{number}/{key}/{rank}" for rank in ranks]
    store.set(keys[trainer.global_rank], str(int(flag)))
    try:
        store.wait(keys, TIMEOUT)
    except RuntimeError as error:  # torch's DistStoreError is one
        silent = [rank for rank in ranks if not store.check([keys[rank]])]
        abort_collectives()
        raise RanksDisagreeError(
            f"{key}: the gradients were not finite on rank {trainer.global_rank}, but rank"
            f" {', '.join(map(str, silent))} did not report the same within {TIMEOUT.total_seconds():g} s. Gradients"
            " are the same on all ranks unless they are not reduced, are changed after the reduction, or an optimizer"
            " does not step at the same batches on each rank. Whether all ranks have skipped this update is not known,"
            " so the run ends: resume from the last checkpoint."
        ) from error
    return [store.get(name) == b"1" for name in keys]
