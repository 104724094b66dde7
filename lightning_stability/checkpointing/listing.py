"""What is in a folder of checkpoints, and which one to go on from."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_stability.checkpointing.resume import SECTION
from lightning_stability.checkpointing.writing import is_part
from lightning_stability.health.values import nonfinite_names

LAST_GOOD = "last_good"
"""The word that stands for the newest complete, finite checkpoint on the command line."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What is known of one checkpoint."""

    path: Path
    bytes: int
    saved: float
    """When, in seconds since 1970."""
    complete: bool
    """Whether it loads, with `weights_only=True`."""
    finite: bool | None = None
    """Whether weights, buffers and optimizer state are finite; None if nobody looked."""
    step: int | None = None
    epochs: float | None = None
    """Epochs trained."""
    metrics: dict[str, float] = field(default_factory=dict)
    problem: str = ""
    """What is wrong with it."""

    @property
    def is_good(self) -> bool:
        """Whether it is complete and known to be finite."""
        return self.complete and self.finite is True


def list_checkpoints(folder: str | os.PathLike[str], verify: bool = False) -> list[CheckpointInfo]:
    """List the checkpoints of a folder, oldest first.

    Those of Lightning's own `ModelCheckpoint` are listed too.

    Args:
        folder: The folder, or one checkpoint.
        verify: Whether to read every byte: check sums, and that all is finite. Otherwise what FractionalCheckpoint
            found before it wrote is believed, and of other files nothing is known.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> torch.save({"state_dict": {"weight": torch.ones(1)}, "global_step": 3, "epoch": 0}, folder / "last.ckpt")
        >>> [info] = list_checkpoints(folder, verify=True)
        >>> info.step, info.complete, info.finite
        (3, True, True)
    """
    infos = [_inspect(path, verify) for path in _checkpoint_files(Path(folder))]
    return sorted(infos, key=lambda info: (info.saved, info.step or 0, info.path.name))


def last_good_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Return the newest checkpoint that is complete and finite, or None.

    Args:
        folder: The folder that FractionalCheckpoint or ModelCheckpoint writes to.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for step, weight in enumerate([1.0, 2.0, float("nan")]):
        ...     checkpoint = {"state_dict": {"weight": torch.tensor(weight)}, "global_step": step}
        ...     torch.save(checkpoint, folder / f"step={step}.ckpt")
        >>> last_good_checkpoint(folder).name
        'step=1.ckpt'
    """
    return newest_good(list_checkpoints(folder))


def newest_good(infos: list[CheckpointInfo]) -> Path | None:
    """Return the newest of these that is complete and finite, or None; look into those of which it is not known.

    Args:
        infos: Of any number of folders.
    """
    # of two names for the same file the one that does not move on
    order = sorted(infos, key=lambda info: (info.saved, info.step or 0, not info.path.name.startswith("last")))
    for info in reversed(order):
        if info.complete and info.finite is None:
            info = _inspect(info.path, verify=True)
        if info.is_good:
            return info.path
    return None


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
    return [folder for folder in folders if next(_checkpoint_files(folder), None) is not None]


def table(infos: list[CheckpointInfo]) -> str:
    """Lay the list out for people.

    Args:
        infos: What `list_checkpoints` returned.
    """
    words = {True: "yes", False: "NO", None: "?"}
    rows = [("checkpoint", "step", "epoch", "size", "saved", "complete", "finite", "metrics")]
    for info in infos:
        metrics = "  ".join(f"{name}={value:.4g}" for name, value in info.metrics.items())
        rows.append(
            (
                info.path.name,
                "" if info.step is None else str(info.step),
                "" if info.epochs is None else f"{info.epochs:.2f}",
                _size(info.bytes),
                datetime.fromtimestamp(info.saved).strftime("%Y-%m-%d %H:%M:%S"),
                words[info.complete],
                words[info.finite] if info.complete else "",
                metrics or info.problem,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _checkpoint_files(folder: Path) -> Iterator[Path]:
    if folder.is_file():
        yield folder
    elif folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.suffix == ".ckpt" and not is_part(path.name):
                yield path


def _inspect(path: Path, verify: bool) -> CheckpointInfo:
    try:
        status = path.stat()
    except OSError as error:  # a link to nothing, or deleted while we look
        return CheckpointInfo(path, 0, 0.0, complete=False, problem=_first_line(error))
    if path.is_dir():
        return _inspect_sharded(path, status.st_mtime)
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is empty, cut short, or no file that torch.save writes")
        if verify and (damaged := _damaged_part(path)):
            raise ValueError(f"{damaged} in it is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
            raise ValueError("it holds no state_dict")
        problem = _what_is_not_finite(checkpoint) if verify else None
    except pickle.UnpicklingError:
        problem = "it holds Python objects, and does not load with weights_only=True"
        return CheckpointInfo(path, status.st_size, status.st_mtime, complete=False, problem=problem)
    except Exception as error:  # whatever zip, pickle and torch stumble over
        return CheckpointInfo(path, status.st_size, status.st_mtime, complete=False, problem=_first_line(error))
    section = _section(checkpoint)
    step, epochs = checkpoint.get("global_step"), section.get("epochs", checkpoint.get("epoch"))
    return CheckpointInfo(
        path=path,
        bytes=status.st_size,
        saved=section.get("saved_at", status.st_mtime),
        complete=True,
        finite=section.get("finite") if problem is None else not problem,
        step=step if isinstance(step, int) else None,
        epochs=epochs if isinstance(epochs, (int, float)) else None,
        metrics=dict(section.get("metrics", {})),
        problem=problem or "",
    )


def _what_is_not_finite(checkpoint: dict[str, Any]) -> str:
    by_design = _section(checkpoint).get("nonfinite_by_design", [])
    tensors = dict(checked_tensors(checkpoint))
    names = [name for name in nonfinite_names(tensors.items()) if own_name(name) not in by_design]
    names = [name for name in names if not _is_mask(tensors[name])]
    return f"not finite: {', '.join(names[:3])}" if names else ""


def _section(checkpoint: dict[str, Any]) -> dict[str, Any]:
    section = checkpoint.get(SECTION)
    return section if isinstance(section, dict) else {}


def own_name(name: str) -> str:
    """The module's name for one of `checked_tensors`: averaging moves its weights to another key."""
    return name.removeprefix("current_model_state.")


class NonfiniteByDesign:
    """Which buffers are not finite when training starts, and where: a causal mask's -inf is no damage.

    Args:
        buffers: Names and tensors, as `named_buffers` gives them.

    Example:
        >>> by_design = NonfiniteByDesign([("mask", torch.tensor([0.0, -torch.inf]))])
        >>> by_design.unexpected([("mask", torch.tensor([1.0, -torch.inf])), ("weight", torch.tensor([torch.nan]))])
        ['weight']
    """

    def __init__(self, buffers: Iterable[tuple[str, Tensor]]) -> None:
        named = dict(buffers)
        self._masks = {name: ~torch.isfinite(named[name]) for name in nonfinite_names(named.items())}

    @property
    def names(self) -> list[str]:
        """The buffers."""
        return list(self._masks)

    def unexpected(self, tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
        """The names of what is not finite and was not so by design.

        Args:
            tensors: `checked_tensors`.
        """
        named = dict(tensors)
        return [name for name in nonfinite_names(named.items()) if not self._has(name, named[name])]

    def _has(self, name: str, tensor: Tensor) -> bool:
        mask = self._masks.get(own_name(name))
        if mask is None or mask.shape != tensor.shape:
            return False
        return not bool((~torch.isfinite(tensor) & ~mask.to(tensor.device)).any())


def _is_mask(tensor: Tensor) -> bool:
    """Whether it looks like a buffer that is infinite by design: infinities among zeros or ones, and no NaN."""
    rest = tensor[torch.isfinite(tensor)]
    return not bool(torch.isnan(tensor).any()) and rest.numel() > 0 and bool(((rest == 0) | (rest == 1)).all())


def checked_tensors(checkpoint: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Return what has to be finite in a checkpoint: weights, buffers, averaged weights, optimizer state.

    Args:
        checkpoint: What Lightning dumped.
    """
    yield from _tensors_of(checkpoint.get("state_dict", {}))
    for key in ("current_model_state", "averaging_state", "optimizer_states"):
        yield from _tensors_of(checkpoint.get(key, {}), key)


def _inspect_sharded(path: Path, saved: float) -> CheckpointInfo:
    """A folder that several ranks wrote; what it holds is not looked into."""
    size = sum(inner.stat().st_size for inner in path.rglob("*") if inner.is_file())
    whole = any((path / name).exists() for name in (".metadata", "meta.pt", "checkpoint"))
    return CheckpointInfo(path, size, saved, complete=whole, problem="" if whole else "it has no metadata")


def _damaged_part(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _tensors_of(tree: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Walk nested dicts, lists and tuples.

    Args:
        tree: What to walk.
        prefix: Put before every name.

    Yields:
        The path of each tensor, joined with dots, and the tensor.
    """
    if isinstance(tree, Tensor):
        yield prefix, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _tensors_of(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from _tensors_of(value, f"{prefix}.{index}" if prefix else str(index))
