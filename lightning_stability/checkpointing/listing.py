"""What is in a folder of checkpoints, and which one to go on from."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning_stability.checkpointing.resume import SECTION
from lightning_stability.checkpointing.sharded import METADATA, load_sharded
from lightning_stability.checkpointing.verification import load_and_verify, load_checkpoint
from lightning_stability.checkpointing.writing import is_part

_OF_DEEPSPEED = "checkpoint"
"""What is in its folders, which are not looked into."""

LAST_GOOD = "last_good"
"""The word that stands for the newest complete, finite checkpoint on the command line."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What is known of one checkpoint: what `list_checkpoints` returns.

    Attributes:
        path: The file, or the folder that several ranks have written.
        bytes: Its size.
        saved: When, in seconds since 1970.
        complete: Whether it loads, with `weights_only=True`, and has the form of a checkpoint.
        finite: Whether weights, buffers and optimizer state are finite; None if nobody looked.
        step: Optimizer steps taken before it was saved; None if the file does not say.
        epochs: Epochs trained.
        metrics: The newest metrics, as they were then.
        problem: What is wrong with it.
        run: The run that wrote it, the same after each resume; empty in files that do not say.
        start: How often that run had been started.
        verified: Whether all of it was read; otherwise `finite` is what the run found before it wrote the file.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "cut_short.ckpt").write_bytes(b"PK")
        >>> [info] = list_checkpoints(folder)
        >>> info.path.name, info.complete
        ('cut_short.ckpt', False)
    """

    path: Path
    bytes: int
    saved: float
    complete: bool
    finite: bool | None = None
    step: int | None = None
    epochs: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    problem: str = ""
    run: str = ""
    start: int = 0
    verified: bool = False

    @property
    def is_good(self) -> bool:
        """Whether it is complete and finite. What was not verified is read for this."""
        if not self.complete or self.finite is False:
            return False
        info = self if self.verified else _inspect(self.path, verify=True)
        return info.complete and info.finite is True


def list_checkpoints(folder: str | os.PathLike[str], verify: bool = False) -> list[CheckpointInfo]:
    """List the checkpoints of a folder, oldest first.

    Those of Lightning's own `ModelCheckpoint` are listed too.

    Args:
        folder: The folder, or one checkpoint.
        verify: Whether to read every byte: check sums, and that all is finite. Otherwise only what a run has written
            down about its files is read.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> torch.save({"state_dict": {"weight": torch.ones(1)}, "global_step": 3, "epoch": 0}, folder / "last.ckpt")
        >>> [info] = list_checkpoints(folder, verify=True)
        >>> info.step, info.complete, info.finite
        (3, True, True)
    """
    return oldest_first([_inspect(path, verify) for path in _checkpoint_files(Path(folder))])


def last_good_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Return the newest checkpoint that is complete and finite, or None.

    The file is read for this, with a progress bar if it takes longer than 2 seconds. One that is damaged is passed
    over. Newest is what has the most steps in a run's newest start; of several runs the one that saved last.

    Args:
        folder: The folder that FractionalCheckpoint or ModelCheckpoint writes to.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> for step, weight in enumerate([1.0, 2.0, float("nan")]):
        ...     checkpoint = {"state_dict": {"weight": torch.tensor(weight)}, "global_step": step}
        ...     torch.save(checkpoint, folder / f"step={step}.ckpt")
        >>> last_good_checkpoint(folder).name
        'step=1.ckpt'
    """
    return newest_good(list_checkpoints(folder))


def newest_good(infos: list[CheckpointInfo]) -> Path | None:
    """Return the newest of these that is complete and finite, or None; read files until one is.

    Args:
        infos: Of any number of folders.
    """
    return next((info.path for info in reversed(oldest_first(infos)) if info.is_good), None)


def find_checkpoints(root: str | os.PathLike[str]) -> list[CheckpointInfo]:
    """List the checkpoints of all runs below a folder, where Lightning puts them.

    Args:
        root: A Trainer's `default_root_dir`, or a folder of checkpoints.
    """
    return [info for folder in checkpoint_folders(root) for info in list_checkpoints(folder)]


def checkpoint_folders(root: str | os.PathLike[str]) -> list[Path]:
    """Those of `find_checkpoints` that have any, without a look into them.

    Args:
        root: A Trainer's `default_root_dir`, a folder of checkpoints, or one checkpoint.
    """
    folders = [Path(root)]
    for pattern in ("checkpoints", "*/checkpoints", "*/*/checkpoints"):
        folders += sorted(Path(root).glob(pattern))
    return [folder for folder in folders if _has_checkpoints(folder)]


def table(infos: list[CheckpointInfo]) -> str:
    """Lay the list out for people."""
    rows = [("checkpoint", "step", "epoch", "size", "saved", "complete", "finite", "metrics")]
    for info in infos:
        metrics = "  ".join(f"{shown(name)}={value:.4g}" for name, value in info.metrics.items())
        finite = {True: "yes" if info.verified else "when saved", False: "NO", None: "?"}[info.finite]
        rows.append(
            (
                shown(info.path.name),
                "" if info.step is None else str(info.step),
                "" if info.epochs is None else f"{info.epochs:.2f}",
                _size(info.bytes),
                _clock(info.saved),
                "yes" if info.complete else "NO",
                finite if info.complete else "",
                shown(info.problem) or metrics,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def shown(text: str) -> str:
    """A name as it can be printed: codes that a terminal would obey are escaped, and a long one is cut.

    Example:
        >>> shown("epoch=1.ckpt"), shown("\\x1b[2J")
        ('epoch=1.ckpt', '\\\\x1b[2J')
    """
    text = text if len(text) <= 200 else f"{text[:200]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def oldest_first(infos: list[CheckpointInfo]) -> list[CheckpointInfo]:
    """Oldest first. Within a run the clock, which may have been set, comes last."""
    newest: dict[str, float] = {}
    for info in infos:
        newest[info.run] = max(info.saved, newest.get(info.run, 0.0))

    def place(info: CheckpointInfo) -> tuple[Any, ...]:
        group = newest[info.run] if info.run else info.saved
        # of two names for the same file the one that stays with it counts as the newer
        stays = not info.path.name.startswith("last")
        return group, info.run, info.start, info.step or 0, info.saved, stays, info.path.name

    return sorted(infos, key=place)


def _checkpoint_files(folder: Path) -> Iterator[Path]:
    if folder.is_file():
        yield folder
    elif folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.suffix == ".ckpt" and not is_part(path.name):
                yield path


def _has_checkpoints(folder: Path) -> bool:
    with contextlib.suppress(OSError):  # somebody else's
        return next(_checkpoint_files(folder), None) is not None
    return False


def _inspect(path: Path, verify: bool) -> CheckpointInfo:
    size, saved = 0, 0.0
    try:
        status = path.stat()
        size, saved, is_folder = status.st_size, status.st_mtime, stat.S_ISDIR(status.st_mode)
        if is_folder:
            size = _size_of_folder(path)
        elif not stat.S_ISREG(status.st_mode):  # reading it might never end
            raise ValueError("it is no regular file")
        checkpoint, names = _load(path, is_folder, verify)
    except Exception as error:  # whatever zip, pickle and torch stumble over, or it is deleted while we look
        return CheckpointInfo(path, size, saved, complete=False, problem=_first_line(error), verified=verify)
    if not checkpoint:
        return CheckpointInfo(path, size, saved, complete=True)
    section = checkpoint.get(SECTION, {})
    finite = section.get("finite")
    return CheckpointInfo(
        path=path,
        bytes=size,
        saved=float(section.get("saved_at", saved)),
        complete=True,
        finite=finite is not False and not names if verify else finite,
        step=checkpoint.get("global_step"),
        epochs=section.get("epochs", checkpoint.get("epoch")),
        metrics=section.get("metrics", {}),
        problem=f"not finite: {', '.join(names[:3])}" if names else "",
        run=section.get("run_id", ""),
        start=section.get("start", 0),
        verified=verify,
    )


def _load(path: Path, is_folder: bool, verify: bool) -> tuple[dict[str, Any], list[str]]:
    """What a checkpoint holds, and the names of what is not finite in it."""
    if not is_folder:
        return load_and_verify(path) if verify else (load_checkpoint(path, verify=False), [])
    if (path / METADATA).exists() or not (path / _OF_DEEPSPEED).exists():
        return load_sharded(path, verify)
    return {}, []


def _size_of_folder(path: Path) -> int:
    """Of what lies in it, two levels deep at most: a link may lead anywhere."""
    files = (
        [*path.glob("*"), *path.glob("*/*")] if (path / METADATA).exists() or (path / _OF_DEEPSPEED).exists() else []
    )
    return sum(inner.stat().st_size for inner in files if inner.is_file() and not inner.is_symlink())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _clock(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):  # a file's time may be anything
        return "?"


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
