"""Checkpoints that several ranks have written together: a folder of torch's distributed checkpoint format.

Nothing in such a folder is trusted: its index is a pickle, of which only torch's own classes for it are loaded.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from lightning_stability.checkpointing.resume import SECTION
from lightning_stability.checkpointing.verification import (
    UnusableError,
    check_form,
    is_known_weight,
    is_mask,
    load_archive,
)
from lightning_stability.health.values import nonfinite_names

METADATA = ".metadata"
"""torch's own: which tensor is where. It is written last."""

REST = "meta.pt"
"""Lightning's: what is no tensor of the module's or an optimizer's."""

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": None,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "torch.torch_version": {"TorchVersion"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "Path", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "Path", "PurePosixPath"},
}
"""What the index may name, by module; None for all that is a class of it."""


class Part(NamedTuple):
    """A stretch of a file that holds a tensor, a piece of one, or another value."""

    name: str
    file: str
    offset: int
    length: int


def is_sharded(path: Path) -> bool:
    """Whether a path is a folder of that format."""
    return (path / METADATA).is_file() and (path / REST).is_file()


def read_rest(path: Path) -> dict[str, Any]:
    """What a folder holds besides weights and optimizer state.

    Raises:
        UnusableError: If it is damaged.
    """
    rest = load_archive(path / REST, verify=True)
    if not isinstance(rest, dict):
        raise UnusableError(f"its {REST} holds no dict")
    check_form(rest)
    return rest


def check_whole(path: Path) -> None:
    """Whether every file of a folder is there, and as long as the index says.

    Raises:
        UnusableError: If not.
    """
    ends: dict[str, int] = defaultdict(int)
    for part in parts(path):
        ends[part.file] = max(ends[part.file], part.offset + part.length)
    for name, end in ends.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size is None or size < end:
            raise UnusableError(f"its {name} is {'missing' if size is None else f'cut short: {size} of {end} bytes'}")


def load_sharded(path: Path, verify: bool) -> tuple[dict[str, Any], list[str]]:
    """Read a folder without its tensors, or all of it.

    Args:
        verify: Whether to read every tensor, one at a time: check sums, and whether it is finite.

    Returns:
        What is no tensor, and the names of what is not finite and not so by design.

    Raises:
        UnusableError: If it is not whole.
    """
    if not (path / METADATA).is_file():
        raise UnusableError(f"it has no {METADATA}: it was not written to its end")
    if not (path / REST).is_file():
        raise UnusableError(f"it has no {REST}")
    rest = read_rest(path)
    check_whole(path)
    if not verify:
        return rest, []
    by_design = rest.get(SECTION, {}).get("nonfinite_by_design")
    names: dict[str, None] = {}
    for name, tensor in _tensors(path):
        own = _own_name(name)
        if nonfinite_names([(own, tensor)]) and not (_may_be(own, tensor) if by_design is None else own in by_design):
            names[own] = None
    return rest, list(names)


def parts(path: Path) -> list[Part]:
    """What the index lists.

    Raises:
        UnusableError: If it cannot be read.
    """
    try:
        with (path / METADATA).open("rb") as file:
            index = _IndexUnpickler(file).load()
        found = [
            Part(str(key.fqn), str(info.relative_path), int(info.offset), int(info.length))
            for key, info in index.storage_data.items()
        ]
    except UnusableError:
        raise
    except Exception as error:  # whatever pickle stumbles over
        raise UnusableError(f"its {METADATA} cannot be read: {type(error).__name__}") from error
    if any("/" in part.file or part.file.startswith("..") or part.offset < 0 for part in found):
        raise UnusableError(f"its {METADATA} names files outside of it")
    return found


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = _ALLOWED.get(module, set())
        found = super().find_class(module, name) if module in _ALLOWED else None
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        known = name in allowed if allowed is not None else isinstance(found, type) and "." not in name
        if not known and not is_dtype and (module, name) != ("builtins", "set"):
            raise UnusableError(f"its {METADATA} names {module}.{name}, which no index of torch does")
        return set if module == "builtins" else found


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Each tensor, or piece of one, with its check sum compared."""
    by_file: dict[str, list[Part]] = defaultdict(list)
    for part in parts(path):
        by_file[part.file].append(part)
    for name, of_file in sorted(by_file.items()):
        with (path / name).open("rb") as file:
            for part in sorted(of_file, key=lambda part: part.offset):
                value = _read(file, part)
                if isinstance(value, Tensor):
                    yield part.name, value


def _read(file: IO[bytes], part: Part) -> Any:
    file.seek(part.offset)
    content = io.BytesIO(file.read(part.length))
    try:
        with zipfile.ZipFile(content) as archive:
            if archive.testzip() is not None:
                raise UnusableError(f"{part.name} in {part.file} is damaged")
        content.seek(0)
        return torch.load(content, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise UnusableError(f"{part.name} in {part.file} is damaged") from error


def _own_name(name: str) -> str:
    """As in a checkpoint of one file."""
    if name.startswith("optimizer_"):
        place, _, rest = name.removeprefix("optimizer_").partition(".")
        return f"optimizer_states.{place}.{rest}"
    return name.removeprefix("state_dict.")


def _may_be(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of a checkpoint that does not say may be infinite: a mask, and no weight."""
    return not name.startswith("optimizer_states.") and not is_known_weight(name) and is_mask(tensor)
