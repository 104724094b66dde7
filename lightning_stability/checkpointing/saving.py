"""One checkpoint on its way to the disk, in the background if wanted, and the ranking of those that are kept."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_stability import internals
from lightning_stability.checkpointing import writing
from lightning_stability.checkpointing.shard_writing import ShardWriter
from lightning_stability.checkpointing.snapshot import HostSnapshot
from lightning_stability.checkpointing.verification import checked_tensors


@dataclass
class PendingSave:
    """A save that is under way, or has just ended."""

    job: writing.WriteJob
    before: dict[str, Any]
    """The callback's bookkeeping as it was, should the save fail."""
    epochs: float
    step: int
    epoch: int
    seconds: float = 0.0
    """How long training has waited for it."""
    error: BaseException | None = None
    failure: str | None = None
    """What it failed with, on all ranks that have been told."""


class Saver:
    """Writes one checkpoint at a time and says how each has ended.

    Args:
        in_background: Whether to write while training continues. Training then waits for a copy in host memory.
    """

    def __init__(self, in_background: bool) -> None:
        self._in_background = in_background
        self._writer = writing.Writer(in_background)
        self._shards: ShardWriter | None = None
        self._snapshot = HostSnapshot() if in_background else None
        self._pending: PendingSave | None = None

    def begin_copy(self, trainer: Any, checkpoint: dict[str, Any]) -> None:
        """If it will be written in the background: begin to copy what is large, before `submit`."""
        writes = internals.writes_shards(trainer) or (trainer.is_global_zero and internals.writes_one_file(trainer))
        if self._snapshot is not None and writes:
            self._snapshot.begin(tensor for _, tensor in checked_tensors(checkpoint))

    def submit(self, trainer: Any, pending: PendingSave, checkpoint: dict[str, Any]) -> None:
        """Begin to write; what was submitted before must have been finished. All ranks call it."""
        self._pending = pending
        if internals.writes_shards(trainer) and writing.is_local(pending.job.path):
            self._submit_shards(trainer, pending, checkpoint)
        elif not internals.writes_one_file(trainer):
            # all ranks write, or a plugin of the user's does: as safe as that is
            trainer.strategy.save_checkpoint(checkpoint, pending.job.path)
            trainer.strategy.barrier("FractionalCheckpoint")
            if trainer.is_global_zero:
                self._writer.submit(pending.job)
        elif trainer.is_global_zero:
            state, ready = checkpoint, _nothing
            if self._snapshot is not None:
                state, ready = self._snapshot.take(checkpoint)
            pending.job.write = lambda path: writing.write_file(state, path)
            self._writer.submit(pending.job, ready)

    def _submit_shards(self, trainer: Any, pending: PendingSave, checkpoint: dict[str, Any]) -> None:
        """Each rank writes what it holds; the first one does what follows."""
        if self._shards is None:
            self._shards = ShardWriter(self._snapshot)
        job = pending.job if trainer.is_global_zero else writing.WriteJob(pending.job.path)
        try:
            wait = self._shards.begin(trainer, checkpoint, job.path)
        except Exception as error:  # a full disk, or what another rank has met
            wait = functools.partial(_raise, error)
        job.write = lambda path: wait()
        self._writer.submit(job)

    def finish(self, trainer: Any, together: bool) -> PendingSave | None:
        """Wait for the save under way; return it, or None if there is none.

        Args:
            together: Whether all ranks are here, so that all learn how it went. Otherwise only the first one knows.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        pending.error = self._writer.wait()
        failure = None if pending.error is None else f"{type(pending.error).__name__}: {pending.error}"
        pending.failure = trainer.strategy.broadcast(failure) if together and trainer.world_size > 1 else failure
        return pending

    def close(self) -> None:
        """End the background thread."""
        self._writer.close()
        if self._shards is not None:
            self._shards.close()


def can_write_in_background(trainer: Any, folder: str) -> bool:
    """Whether checkpoints are one file, or shards in a folder of this machine."""
    return internals.writes_one_file(trainer) or (internals.writes_shards(trainer) and writing.is_local(folder))


def best_first(scores: dict[str, Tensor | None], mode: str) -> list[str]:
    """The paths that have a score, the best one first.

    Example:
        >>> import torch
        >>> best_first({"a": torch.tensor(2.0), "b": None, "c": torch.tensor(1.0)}, "min")
        ['c', 'a']
    """
    ranked = {path: float(score) for path, score in scores.items() if score is not None}
    return sorted(ranked, key=lambda path: ranked[path], reverse=mode == "max")


def _raise(error: Exception) -> None:
    raise error


def _nothing() -> None:
    pass
