"""Writing a checkpoint of which each rank holds a part, in the background if wanted, so that a kill leaves no half.

All ranks write into one folder beside the place of the checkpoint. When all have, the first one adds what is no tensor,
looks whether all files are there, and moves the folder into place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_stability import atomic
from lightning_stability.checkpointing.sharded import REST, check_whole
from lightning_stability.checkpointing.snapshot import HostSnapshot


class ShardWriter:
    """Writes one checkpoint at a time; made on all ranks together.

    Args:
        snapshot: Copies each rank's part to host memory, so that `begin` need not wait for the disk; None to wait.
    """

    def __init__(self, snapshot: HostSnapshot | None) -> None:
        self._snapshot = snapshot
        # of its own: what is exchanged while training continues must not meet what training exchanges
        self._group = torch.distributed.new_group(backend="gloo") if snapshot else None

    def begin(self, trainer: Any, checkpoint: dict[str, Any], path: str) -> Callable[[], None]:
        """Begin to write. All ranks call it.

        Args:
            checkpoint: As it was dumped; on the first rank all of it, on the others what is theirs.
            path: On a file system that all ranks see.

        Returns:
            What waits until it is written, to be called on each rank, in a thread if wanted. It raises if a rank could
            not write, and then there is nothing under that name.
        """
        tensors = {"state_dict": checkpoint["state_dict"]}
        tensors |= {f"optimizer_{i}": state for i, state in enumerate(checkpoint.get("optimizer_states", []))}
        rest: dict[str, Any] = {}
        if trainer.is_global_zero:
            rest = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
        ready = _nothing
        if self._snapshot is not None:
            # not by torch's async_save, which copies each sharded tensor together with its mesh, and plans before it
            # returns: training waited four times as long as for the copy
            (tensors, rest), ready = self._snapshot.take((tensors, rest))
        part = Path(self._from_first_rank(atomic.part_path(Path(path))))
        if trainer.is_global_zero:
            atomic.delete(part)
            part.mkdir(parents=True)

        def write() -> None:
            ready()
            self._write(tensors, rest, part, Path(path), trainer.is_global_zero)

        return write

    def _from_first_rank(self, path: Path) -> str:
        """In the group that does not wait for the device."""
        found = [str(path)]
        torch.distributed.broadcast_object_list(found, group=self._group)
        return found[0]

    def close(self) -> None:
        """End what the ranks exchange."""
        with contextlib.suppress(Exception):  # other ranks may be gone
            if self._group is not None:
                torch.distributed.destroy_process_group(self._group)

    def _write(self, tensors: Any, rest: Any, part: Path, path: Path, is_first: bool) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        # raises on all ranks if it does on one
        save(tensors, storage_writer=FileSystemWriter(part), process_group=self._group)
        if is_first:
            _finish(part, path, rest)


def _finish(part: Path, path: Path, rest: Any) -> None:
    """All ranks have written: complete the folder and move it into place."""
    with (part / REST).open("wb") as file:
        torch.save(rest, file)
    atomic.move_into_place(part, path, check_whole)


def _nothing() -> None:
    pass
