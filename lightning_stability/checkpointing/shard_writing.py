"""Writing a checkpoint of which each rank holds a part, in the background if wanted, so that a kill leaves no half.

All ranks write into one folder beside the place of the checkpoint. When all have, the first one adds what is no tensor,
looks whether all files are there, and moves the folder into place.
"""

from __future__ import annotations

import contextlib
import inspect
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
        in_background: Whether `begin` returns when each rank's part is copied to host memory, pinned on a GPU. That
            memory is used again by the next one.
    """

    def __init__(self, in_background: bool) -> None:
        self._in_background = in_background
        # of its own: what is exchanged while training continues must not meet what training exchanges
        self._group = torch.distributed.new_group(backend="gloo") if in_background else None
        self._rest = HostSnapshot()
        self._stager: Any = None

    def begin(self, trainer: Any, checkpoint: dict[str, Any], path: str) -> Callable[[], None]:
        """Begin to write. All ranks call it.

        Args:
            checkpoint: As it was dumped; on the first rank all of it, on the others what is theirs.
            path: On a file system that all ranks see.

        Returns:
            What waits until it is written, to be called on each rank, in a thread if wanted. It raises if a rank could
            not write, and then there is nothing under that name.
        """
        part = Path(trainer.strategy.broadcast(str(atomic.part_path(Path(path)))))
        if trainer.is_global_zero:
            atomic.delete(part)
            part.mkdir(parents=True)
        tensors = {"state_dict": checkpoint["state_dict"]}
        tensors |= {f"optimizer_{i}": state for i, state in enumerate(checkpoint.get("optimizer_states", []))}
        rest = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
        if self._in_background:
            return self._begin_in_background(tensors, rest, part, path, trainer)
        return lambda: self._write(tensors, rest, part, path, trainer)

    def close(self) -> None:
        """Give the memory back."""
        self._stager = None
        with contextlib.suppress(Exception):  # other ranks may be gone
            if self._group is not None:
                torch.distributed.destroy_process_group(self._group)

    def _write(self, tensors: Any, rest: Any, part: Path, path: str, trainer: Any) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        save(tensors, storage_writer=FileSystemWriter(part))  # raises on all ranks if it does on one
        if trainer.is_global_zero:
            _finish(part, Path(path), rest)

    def _begin_in_background(self, tensors: Any, rest: Any, part: Path, path: str, trainer: Any) -> Callable[[], None]:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        options: dict[str, Any] = {}
        if "async_stager" in inspect.signature(async_save).parameters:  # torch 2.7 copies as its writer does
            self._stager = self._stager or _make_stager(trainer.strategy.root_device)
            options["async_stager"] = self._stager
        copied, ready = self._rest.take(rest) if trainer.is_global_zero else ({}, _nothing)
        future: Any = async_save(
            tensors,
            storage_writer=FileSystemWriter(part),
            process_group=self._group,
            **options,
        )

        def wait() -> None:
            future.result()
            ready()
            if trainer.is_global_zero:
                _finish(part, Path(path), copied)

        return wait


def _finish(part: Path, path: Path, rest: Any) -> None:
    """All ranks have written: complete the folder and move it into place."""
    with (part / REST).open("wb") as file:
        torch.save(rest, file)
    atomic.move_into_place(part, path, check_whole)


def _make_stager(device: torch.device) -> Any:
    """What copies each rank's part to host memory, and keeps that memory for the next copy."""
    from torch.distributed.checkpoint.staging import BlockingAsyncStager

    # (torch's DefaultStager cannot copy sharded tensors in torch 2.11: KeyError)
    return BlockingAsyncStager(cache_staged_state_dict=device.type == "cuda")  # kept memory is pinned


def _nothing() -> None:
    pass
