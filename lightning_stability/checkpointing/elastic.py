"""Continuing inside an epoch with another number of processes, or another batch size."""

from __future__ import annotations

from typing import Any

from lightning_stability import internals
from lightning_stability.checkpointing import orders
from lightning_stability.checkpointing.dealing import batch_sizes, share, trained
from lightning_stability.checkpointing.merging import merged_metrics
from lightning_stability.checkpointing.orders import NotDealtOut as NotDealtOut
from lightning_stability.checkpointing.passes import Position, Start


def state_of_rank(ranks: list[dict[str, Any]], rank: int, world_size: int, module: Any) -> dict[str, Any]:
    """What a rank continues with, where the checkpoint was written by another number of ranks.

    Args:
        ranks: The states of those that wrote it.
        module: It has the metrics.
    """
    like = ranks[rank % len(ranks)]
    return {
        **like,
        "random": like["random"] if rank < len(ranks) else None,
        "data": ranks[0]["data"],  # the order of all ranks follows from one's
        "metrics": merged_metrics([state["metrics"] for state in ranks], rank, world_size, module),
        "gradients": _summed_gradients(ranks, rank, world_size),
    }


def _summed_gradients(ranks: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """Of a window that is under way: the mean over ranks stays what it was."""
    if rank > 0:
        return {}
    names = ranks[0]["gradients"]
    scale = world_size / len(ranks)
    return {name: sum(state["gradients"][name] for state in ranks) * scale for name in names}


def is_dealt_otherwise(position: Position, loader: Any, world_size: int) -> bool:
    """Whether a loader of now deals out the samples in another way than where a position is from."""
    dealt, source = position["dealt"], position["source"]
    if dealt is not None:
        return bool(dealt["ranks"] != world_size or dealt["batch_size"] != orders.batch_size(loader))
    size = source.get("batch_size")
    return bool(source.get("world_size") != world_size or size != orders.batch_size(loader))


def dealt_anew(position: Position, loader: Any, rank: int, world_size: int) -> tuple[Start, int]:
    """Deal out the samples of an epoch that are left.

    Args:
        position: Of the loader that took the others, on whichever rank.
        loader: Who takes these.

    Returns:
        Where the loader begins, and how many batches each rank gets.

    Raises:
        NotDealtOut: If what is left is not known.
    """
    order = orders.whole_order(position["source"], loader)
    start, end = _left(position, len(order))
    dealt = {
        "start": start,
        "end": end,
        "ranks": world_size,
        "batch_size": orders.batch_size(loader),
        "drop_last": orders.drops_last(loader),
    }
    at = {**position, "batches": 0, "last": None, "dealt": dealt}
    sizes = _sizes(dealt)
    return Start(at, rest=_rest(order, at, loader, rank, sizes)), len(sizes) // world_size


def dealt_before(position: Position, loader: Any, rank: int) -> Start:
    """Continue with samples that were dealt out anew, in the same way."""
    order = orders.whole_order(position["source"], loader)
    return Start(position, rest=_rest(order, position, loader, rank, _sizes(position["dealt"])))


def samples_left(start: Start) -> int:
    """How many samples are left for all ranks."""
    dealt = start.position["dealt"]
    return int(dealt["end"] - dealt["start"])


def _left(position: Position, samples: int) -> tuple[int, int]:
    """Between which samples of the order lie those that are left."""
    dealt, source, batches = position["dealt"], position["source"], position["batches"]
    if dealt is not None:
        done = trained(dealt["end"] - dealt["start"], _sizes(dealt), dealt["ranks"], batches)
        return dealt["start"] + done, dealt["end"]
    step, limit = source["ranks"] * source["batch_size"], position["limit"]
    return min(samples, step * batches), samples if limit is None else min(samples, step * limit)


def _sizes(dealt: dict[str, Any]) -> list[int]:
    return batch_sizes(dealt["end"] - dealt["start"], dealt["ranks"], dealt["batch_size"], dealt["drop_last"])


def _rest(order: list[Any], position: Position, loader: Any, rank: int, sizes: list[int]) -> list[Any]:
    dealt = position["dealt"]
    batches = share(order[dealt["start"] : dealt["end"]], sizes, dealt["ranks"], rank, position["batches"])
    if internals.index_sampler(loader) is loader.batch_sampler:
        return batches
    return [index for batch in batches for index in batch]
