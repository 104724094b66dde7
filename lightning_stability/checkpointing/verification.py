"""Whether a checkpoint on the disk is whole, of the right form and finite. Nothing that it holds is trusted."""

from __future__ import annotations

import contextlib
import math
import pickle
import re
import zipfile
from collections import deque
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
_RATES_OF_SCHEDULERS = {"base_lrs", "_last_lr", "max_lrs", "min_lrs"}
_AT_ONCE = 2**26
"""Bytes that are compared with their check sums, then looked at while they are still in memory."""
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
    if not checkpoint["state_dict"]:
        raise UnusableError("its state_dict is empty")
    for name, value in checkpoint["state_dict"].items():
        if not isinstance(value, Tensor) and name.endswith((".weight", ".bias")):
            raise UnusableError(f"its {name} is no tensor")
        if isinstance(value, Tensor) and value.device.type == "meta":
            raise UnusableError(f"its {name} has a shape and no numbers")
    for place, state in enumerate(checkpoint.get("optimizer_states", [])):
        _check_fields(state, _OPTIMIZER_FIELDS, f"optimizer_states.{place}.")
        for group in state.get("param_groups", []):
            _check_fields(group, _GROUP_FIELDS, f"optimizer_states.{place}.param_groups.")
    return checkpoint


def load_and_verify(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A checkpoint, and what is not finite in it. Every byte is compared with its check sum, in one read of the file.

    Raises:
        UnusableError: If it is damaged, or no checkpoint.
    """
    checkpoint = load_checkpoint(path, verify=False)
    with _reading(path, checkpoint) as read:
        return checkpoint, what_is_not_finite(checkpoint, read)


def load_archive(path: Path, verify: bool) -> Any:
    """What `torch.save` wrote, as `load_checkpoint` loads it, whatever it is."""
    _check_archive(path, verify)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UnusableError("it holds Python objects, and does not load with weights_only=True") from error
    except RuntimeError as error:  # an archive that is none of torch's
        raise UnusableError("it is no file that torch.save writes") from error


def check_form(checkpoint: dict[str, Any]) -> None:
    """Whether what a checkpoint holds besides weights and optimizer state is of the right form.

    Raises:
        UnusableError: If it is not.
    """
    _check_fields(checkpoint, _FIELDS, "")
    _check_fields(checkpoint.get(SECTION, {}), _SECTION_FIELDS, f"{SECTION}.")
    _check_counts(checkpoint.get("loops", {}), "loops")


def what_is_not_finite(
    checkpoint: dict[str, Any], read: Callable[[list[Tensor]], object] = lambda tensors: None
) -> list[str]:
    """The names of what is not finite in a checkpoint, and not so by design.

    Of which buffers that may be, FractionalCheckpoint has written down. In files of others, infinities among zeros or
    ones are taken for a mask, unless it is known to be a weight.

    Args:
        checkpoint: What Lightning dumped, or what was loaded.
        read: Is called with some tensors before these are looked at, in the order of their places in memory.
    """
    tensors = [(name, _as_stored(tensor)) for name, tensor in checked_tensors(checkpoint)]
    places: list[int] = []
    for some in _at_once(tensors):
        read([tensors[place][1] for place in some])
        places += [int(place) for place in nonfinite_names((str(place), tensors[place][1]) for place in some)]
    found = [tensors[place] for place in sorted(places)]
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
        elif isinstance(leaf, float) and (math.isnan(leaf) or (math.isinf(leaf) and _is_rate_or_moment(name))):
            yield name, torch.tensor(leaf)
    for name, leaf in _leaves(checkpoint.get("lr_schedulers", []), "lr_schedulers", walked):
        if isinstance(leaf, float) and not math.isfinite(leaf) and _RATES_OF_SCHEDULERS & set(name.split(".")):
            yield name, torch.tensor(leaf)
    for key, state in checkpoint.get("callbacks", {}).items():
        if isinstance(state, dict) and "average_model_state" in state:  # StochasticWeightAveraging's
            prefix = f"callbacks.{key}.average_model_state"
            yield from _tensors(_leaves(state["average_model_state"], prefix, walked))
    for key, state in checkpoint.items():
        if isinstance(state, dict) and {"scale", "growth_factor"} <= state.keys():  # a GradScaler's
            yield f"{key}.scale", torch.as_tensor(state["scale"])


def _is_rate_or_moment(name: str) -> bool:
    return name.endswith(_RATES) or name.split(".")[2:3] == ["state"]


def own_name(name: str) -> str:
    """The module's name for one of `checked_tensors`: averaging moves its weights to another key."""
    if name.startswith("callbacks."):
        return name.rpartition(".average_model_state.")[2]
    return name.removeprefix("current_model_state.")


def _at_once(tensors: list[tuple[str, Tensor]]) -> Iterator[list[int]]:
    """The places of tensors in the list, some at a time, in the order of their places in memory."""
    some: list[int] = []
    size = 0
    for place in sorted(range(len(tensors)), key=lambda place: min(_storages(tensors[place][1]) or [(0, 0)])):
        some.append(place)
        size += tensors[place][1].numel() * tensors[place][1].element_size()
        if size >= _AT_ONCE:
            yield some
            some, size = [], 0
    yield some


def _storages(tensor: Tensor) -> list[tuple[int, int]]:
    """Where a tensor's numbers are in memory, and how many bytes; nothing where that is not known."""
    if tensor.is_sparse:
        return [*_storages(tensor._indices()), *_storages(tensor._values())]
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested:
        return []
    storage = tensor.untyped_storage()
    return [(storage.data_ptr(), storage.nbytes())] if storage.nbytes() else []


@contextlib.contextmanager
def _reading(path: Path, checkpoint: dict[str, Any]) -> Iterator[Callable[[list[Tensor]], None]]:
    """Compare the tensors' bytes with their check sums, up to those that are asked for; all of them in the end.

    Tensors lie in memory as in the file. Where they cannot be told from each other, all are compared at once.
    """
    with zipfile.ZipFile(path) as archive:
        parts = sorted(
            (part for part in archive.infolist() if _DATA.fullmatch(part.filename)), key=lambda part: part.header_offset
        )
        if not any(part.CRC for part in archive.infolist()):
            parts = []  # written after torch.serialization.set_crc32_options(False)
        held = sorted({place for _, tensor in _tensors(_leaves(checkpoint, "", set())) for place in _storages(tensor)})
        filled = [part for part in parts if part.file_size]
        number = {place: n for n, (place, _) in enumerate(held)}
        if [size for _, size in held] != [part.file_size for part in filled]:
            number = {}
        with _progress(path, sum(part.file_size for part in parts)) as progress:
            left = deque(filled)

            def compare(last: int) -> None:
                while left and len(filled) - len(left) <= last:
                    _read(archive, left.popleft(), progress)

            def read(tensors: list[Tensor]) -> None:
                asked = [number.get(place, len(filled)) for tensor in tensors for place, _ in _storages(tensor)]
                compare(max(asked, default=-1))

            yield read
            compare(len(filled))


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
_NUMBER: _Kind = ("a number", lambda v: _is_number(v) or isinstance(v, Tensor))
_DICTS: _Kind = ("a list of dicts", lambda v: _is_list(v) and all(map(_is_dict, v)))
_FIELDS: dict[str, _Kind] = {
    "state_dict": ("a dict by name", lambda v: _is_dict(v) and all(map(_is_text, v))),
    "global_step": _INT,
    "epoch": _INT,
    "loops": _DICT,
    "callbacks": _DICT,
    "optimizer_states": _DICTS,
    "lr_schedulers": _LIST,
    "pytorch-lightning_version": _TEXT,
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
    "lr": _NUMBER,
    "betas": ("numbers", lambda v: isinstance(v, (list, tuple)) and all(map(_NUMBER[1], v))),
    "momentum": _NUMBER,
    "weight_decay": _NUMBER,
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
