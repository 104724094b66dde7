"""Whether a checkpoint on the disk is whole, of the right form and finite. Nothing that it holds is trusted."""

from __future__ import annotations

import contextlib
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_stability.checkpointing.resume import SECTION
from lightning_stability.health.values import nonfinite_names

_CHUNK = 2**20
_SHOW_PROGRESS_AFTER = 2.0
_DATA = re.compile(r"[^/]*/data/\d+")
_WEIGHT = re.compile(r"(.*\.)?(weight\w*|weight\..*|\w+_weight|bias|bias_[ih]h\w*|\w*proj_bias)")
_RATES = (".lr", ".initial_lr")
_FOLDER = 0x10  # as an attribute of MS-DOS: torch reads nothing of such a part, whatever it holds
_YEAR_9999 = 253402300799


class UnusableError(Exception):
    """What is wrong with a file."""


def load_checkpoint(path: Path, verify: bool) -> dict[str, Any]:
    """Load a checkpoint without its tensors' data, which is read when it is used.

    Args:
        path: A regular file.
        verify: Whether to compare every byte with its check sum first; otherwise only those outside the tensors.

    Raises:
        UnusableError: If it is damaged, or no checkpoint.
    """
    checkpoint = load_archive(path, verify)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UnusableError("it holds no state_dict")
    check_form(checkpoint)
    for name, value in checkpoint["state_dict"].items():
        if not isinstance(value, Tensor) and name.endswith((".weight", ".bias")):
            raise UnusableError(f"its {name} is no tensor")
    for place, state in enumerate(checkpoint.get("optimizer_states", [])):
        _check_fields(state, _OPTIMIZER_FIELDS, f"optimizer_states.{place}.")
        for group in state.get("param_groups", []):
            _check_fields(group, _GROUP_FIELDS, f"optimizer_states.{place}.param_groups.")
    return checkpoint


def load_archive(path: Path, verify: bool) -> Any:
    """What `torch.save` wrote, as `load_checkpoint` loads it, whatever it is."""
    _check_archive(path, verify)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UnusableError("it holds Python objects, and does not load with weights_only=True") from error


def check_form(checkpoint: dict[str, Any]) -> None:
    """Whether what a checkpoint holds besides weights and optimizer state is of the right form.

    Raises:
        UnusableError: If it is not.
    """
    _check_fields(checkpoint, _FIELDS, "")
    _check_fields(checkpoint.get(SECTION, {}), _SECTION_FIELDS, f"{SECTION}.")
    _check_counts(checkpoint.get("loops", {}), "loops")


def what_is_not_finite(checkpoint: dict[str, Any]) -> list[str]:
    """The names of what is not finite in a checkpoint, and not so by design.

    Of which buffers that may be, FractionalCheckpoint has written down. In files of others, infinities among zeros or
    ones are taken for a mask, unless it is known to be a weight.
    """
    tensors = [(name, _as_stored(tensor)) for name, tensor in checked_tensors(checkpoint)]
    found = [tensors[int(place)] for place in nonfinite_names((str(i), t) for i, (_, t) in enumerate(tensors))]
    by_design = checkpoint.get(SECTION, {}).get("nonfinite_by_design")
    if by_design is not None:
        return [name for name, _ in found if own_name(name) not in by_design]
    is_weight = _weights_of(checkpoint, tensors)
    return [name for name, tensor in found if is_weight(name, tensor) or not is_mask(tensor)]


def checked_tensors(checkpoint: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """What has to be finite in a checkpoint: weights, buffers, averaged weights, optimizer state and learning rates.

    Args:
        checkpoint: What Lightning dumped.
    """
    walked: set[int] = set()
    yield from _tensors(_leaves(checkpoint.get("state_dict", {}), "", walked))
    for key in ("current_model_state", "averaging_state"):
        yield from _tensors(_leaves(checkpoint.get(key, {}), key, walked))
    for name, leaf in _leaves(checkpoint.get("optimizer_states", {}), "optimizer_states", walked):
        if isinstance(leaf, Tensor):
            yield name, leaf
        elif isinstance(leaf, float) and (math.isnan(leaf) or (math.isinf(leaf) and name.endswith(_RATES))):
            yield name, torch.tensor(leaf)


def own_name(name: str) -> str:
    """The module's name for one of `checked_tensors`: averaging moves its weights to another key."""
    return name.removeprefix("current_model_state.")


def _check_archive(path: Path, verify: bool) -> None:
    """Compare what was written with its check sums."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            size = sum(part.file_size for part in parts)
            unlike = [p for p in parts if p.compress_type != zipfile.ZIP_STORED or p.external_attr & _FOLDER]
            if unlike or size > path.stat().st_size:
                raise UnusableError("it is no file that torch.save writes")
            if not any(part.CRC for part in parts):
                return  # written after torch.serialization.set_crc32_options(False)
            if not verify:
                parts = [part for part in parts if not _DATA.fullmatch(part.filename)]
            with _progress(path, size) if verify else contextlib.nullcontext() as progress:
                for part in parts:
                    _read(archive, part, progress)
    except zipfile.BadZipFile as error:
        raise UnusableError("it is empty, cut short, or no file that torch.save writes") from error


def _read(archive: zipfile.ZipFile, part: zipfile.ZipInfo, progress: Any) -> None:
    try:
        with archive.open(part) as file:
            while chunk := file.read(_CHUNK):
                if progress is not None:
                    progress.update(len(chunk))
    except (zipfile.BadZipFile, EOFError) as error:
        raise UnusableError(f"{part.filename} in it is damaged") from error


def _progress(path: Path, size: int) -> Any:
    name = path.name if path.name.isprintable() else ascii(path.name)
    return tqdm(
        desc=f"Verifying {name}", total=size, unit="B", unit_scale=True, leave=False, delay=_SHOW_PROGRESS_AFTER
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return _is_int(value) or isinstance(value, float)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


_Kind = tuple[str, Callable[[Any], bool]]
_INT: _Kind = ("an int", _is_int)
_FLAG: _Kind = ("a bool", _is_flag)
_TEXT: _Kind = ("a str", _is_text)
_DICT: _Kind = ("a dict", _is_dict)
_LIST: _Kind = ("a list", _is_list)
_DICTS: _Kind = ("a list of dicts", lambda v: _is_list(v) and all(map(_is_dict, v)))
_FIELDS: dict[str, _Kind] = {
    "state_dict": ("a dict by name", lambda v: _is_dict(v) and all(map(_is_text, v))),
    "global_step": _INT,
    "epoch": _INT,
    "loops": _DICT,
    "callbacks": _DICT,
    "optimizer_states": _DICTS,
    "lr_schedulers": _LIST,
    SECTION: _DICT,
}
_SECTION_FIELDS: dict[str, _Kind] = {
    "format": _INT,
    "run_id": _TEXT,
    "start": _INT,
    "saved_at": ("a time in seconds since 1970", lambda v: _is_number(v) and 0 <= v < _YEAR_9999),
    "epochs": ("a finite number", lambda v: _is_number(v) and math.isfinite(v)),
    "finite": _FLAG,
    "nonfinite_by_design": ("a list of names", lambda v: _is_list(v) and all(map(_is_text, v))),
    "metrics": ("a dict of numbers", lambda v: _is_dict(v) and all(_is_text(k) and _is_number(v[k]) for k in v)),
    "inside_epoch": _FLAG,
    "batch_is_over": _FLAG,
    "stop_is_due": _FLAG,
    "ranks": _DICTS,
}  # fmt: skip


_OPTIMIZER_FIELDS: dict[str, _Kind] = {
    "state": _DICT,
    "param_groups": _DICTS,
}
_GROUP_FIELDS: dict[str, _Kind] = {
    "params": _LIST,
    "lr": ("a number", lambda v: _is_number(v) or isinstance(v, Tensor)),
}


def _check_counts(loop: Any, prefix: str) -> None:
    """Lightning counts in dicts that are called so; with anything else there a resume fails."""
    for name, value in loop.items() if isinstance(loop, dict) else ():
        if name in ("total", "current"):
            kinds = dict.fromkeys(value, _INT) if isinstance(value, dict) else {}
            _check_fields({name: value}, {name: _DICT}, f"{prefix}.")
            _check_fields(value, kinds, f"{prefix}.{name}.")
        elif isinstance(value, dict):
            _check_counts(value, f"{prefix}.{name}")


def _check_fields(values: dict[str, Any], kinds: dict[str, _Kind], prefix: str) -> None:
    for name, (expected, is_right) in kinds.items():
        if name in values and not is_right(values[name]):
            value = repr(values[name]) if isinstance(values[name], (str, int, float)) else ""
            found = f"{value[:40]} ({type(values[name]).__name__})".lstrip()
            raise UnusableError(f"its {prefix}{name} is {found}, expected {expected}")


def _leaves(tree: Any, prefix: str, walked: set[int]) -> Iterator[tuple[str, Any]]:
    """What nested dicts, lists and tuples hold, with the path of each, joined with dots. Each is walked once."""
    if isinstance(tree, (dict, list, tuple)):
        if id(tree) in walked:
            return
        walked.add(id(tree))
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key), walked)
    else:
        yield prefix, tree


def _tensors(leaves: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    return ((name, leaf) for name, leaf in leaves if isinstance(leaf, Tensor))


def _as_stored(tensor: Tensor) -> Tensor:
    """A tensor that repeats its memory, which may be a few bytes that claim to be terabytes, without the repetition."""
    if tensor.is_sparse:
        tensor = tensor._values()
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return tensor
    storage = tensor.untyped_storage()
    if tensor.numel() * tensor.element_size() <= storage.nbytes():
        return tensor
    return torch.empty(0, dtype=tensor.dtype).set_(storage)  # type: ignore[call-overload, no-any-return]


def _weights_of(checkpoint: dict[str, Any], tensors: list[tuple[str, Tensor]]) -> Callable[[str, Tensor], bool]:
    """Tells what is known to be a weight or to belong to one: by its name, by a moment of its shape in the optimizer's
    state, or because the optimizer has as many weights as there are tensors.
    """
    states = checkpoint.get("optimizer_states", [])
    groups = [g for s in states for g in (s.get("param_groups") or []) if isinstance(g, dict)]
    trained = sum(len(g["params"]) for g in groups if isinstance(g.get("params"), list))
    shapes = {tensor.shape for name, tensor in tensors if name.startswith("optimizer_states.") and tensor.dim()}
    all_trained = trained >= len(checkpoint["state_dict"])

    def is_weight(name: str, tensor: Tensor) -> bool:
        ours = name.startswith("optimizer_states.") or is_known_weight(name)
        return ours or all_trained or tensor.shape in shapes

    return is_weight


def is_known_weight(name: str) -> bool:
    """Whether a name is that of a weight, whatever the module."""
    return _WEIGHT.fullmatch(name) is not None


def is_mask(tensor: Tensor) -> bool:
    """Whether it looks like a buffer that is infinite by design: infinities among zeros or ones, and no NaN."""
    rest = tensor[torch.isfinite(tensor)]
    return not bool(torch.isnan(tensor).any()) and rest.numel() > 0 and bool(((rest == 0) | (rest == 1)).all())
