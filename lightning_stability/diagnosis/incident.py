"""The incident folder: a recorded step on the disk, written whole or not at all, and read without executing anything.

| file | holds |
|---|---|
| `incident.json` | what, where, versions, the module's import path, and a checksum of every file |
| `batches.pt` | the window's batches |
| `state.pt` | weights, buffers, optimizers and metrics from before the window |
| `random.pt` | the random state before each batch |
| `history.jsonl` | the steps before |
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lightning_stability.atomic import put_in_place, remove_parts
from lightning_stability.diagnosis.environment import capture_environment
from lightning_stability.diagnosis.errors import DiagnosisError
from lightning_stability.diagnosis.fields import check_fields, digest
from lightning_stability.diagnosis.plain import NotPlainError, from_plain, to_plain
from lightning_stability.diagnosis.rebuild import describe
from lightning_stability.diagnosis.step import RecordedStep, State, capture_state
from lightning_stability.recovery.random_state import RandomState

FORMAT = "lightning-stability incident"
SCHEMA = 1
_SPARE_BYTES = 64 * 2**20
"""What is left free on a disk."""
_IN_STATE = {"parameters", "requires_grad", "buffers", "metrics", "optimizers", "schedulers", "scaler"}
_FROM_STEP = (
    *("precision", "failed", "optimizer", "loss_divisor", "loss_scale", "clip_value", "clip_algorithm"),
    *("steps_before", "schedulers", "validation_loader"),
)


@dataclass
class Incident:
    """What an incident folder says.

    Attributes:
        folder: Where it is.
        about: The content of `incident.json`.
        batches: The window's batches; None if they could not be kept.
        state: What `capture_state` gave; None if it was not kept.
        random_states: One for each batch.
        history: The steps before, oldest first.

    Example:
        >>> import tempfile
        >>> module = torch.nn.Linear(1, 1)
        >>> step = RecordedStep(module, batches=[torch.ones(2, 1)], random_states=[RandomState.capture()])
        >>> folder = Path(tempfile.mkdtemp()) / "1-step0"
        >>> _ = write_incident(folder, step, history=[{"step": 0, "loss": 1.5}])
        >>> incident = read_incident(folder)
        >>> incident.about["failed"], incident.history
        ('loss', [{'step': 0, 'loss': 1.5}])
    """

    folder: Path
    about: dict[str, Any]
    batches: list[Any] | None
    state: dict[str, Any] | None
    random_states: list[dict[str, Any]]
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def left_out(self) -> dict[str, str]:
        """What could not be kept, and why."""
        return self.about["left_out"]  # type: ignore[no-any-return]


def write_incident(
    folder: str | os.PathLike[str],
    step: RecordedStep,
    history: Iterable[dict[str, Any]] = (),
    details: dict[str, Any] | None = None,
    save_state: bool = True,
) -> dict[str, str]:
    """Write a recorded step. What a killed process has left half written beside it is deleted.

    Args:
        folder: The incident's folder, which is not there yet.
        step: The step.
        history: One row for each step before.
        details: What else `incident.json` shall say, as JSON holds it.
        save_state: Whether weights and optimizer states are kept.

    Returns:
        What could not be kept, and why.

    Raises:
        OSError: If nothing could be written, or there is such a folder already.

    Example:
        >>> import tempfile
        >>> module = torch.nn.Linear(1, 1)
        >>> step = RecordedStep(module, batches=[torch.ones(2, 1)], random_states=[RandomState.capture()])
        >>> write_incident(Path(tempfile.mkdtemp()) / "1-step0", step)
        {}
    """
    left_out: dict[str, str] = {}

    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_parts(folder.parent)

    def fill(part: Path) -> None:
        _fill(part, step, list(history), details or {}, save_state, left_out)

    put_in_place(folder, fill, replaces_folder=False)
    return left_out


def read_incident(folder: str | os.PathLike[str]) -> Incident:
    """Read an incident folder; every file is compared with its checksum, every field with what it has to be.

    Args:
        folder: The incident's folder.

    Raises:
        DiagnosisError: If it is none, or not as it was written.

    Example:
        >>> import tempfile
        >>> module = torch.nn.Linear(1, 1)
        >>> step = RecordedStep(module, batches=[torch.ones(2, 1)], random_states=[RandomState.capture()])
        >>> folder = Path(tempfile.mkdtemp()) / "1-step0"
        >>> _ = write_incident(folder, step)
        >>> read_incident(folder).batches
        [tensor([[1.],
                [1.]])]
    """
    folder = Path(folder)
    about = _read_about(folder)
    for name, file in about["files"].items():
        _check_file(folder / name, file["bytes"], file["sha256"])
    batches = state = None
    if "batches.pt" in about["files"]:
        batches = _load(folder / "batches.pt", list)
    random_states = _load(folder / "random.pt", list)
    if "state.pt" in about["files"]:
        state = _load(folder / "state.pt", dict)
        if not {"parameters", "requires_grad", "buffers", "metrics", "optimizers"} <= set(state) <= _IN_STATE:
            raise DiagnosisError(f"{folder / 'state.pt'} holds no training state: {', '.join(sorted(state))[:200]}")
    count = len(about["batch_indices"])
    if len(random_states) != count or (batches is not None and len(batches) != count):
        raise DiagnosisError(f"{folder}: incident.json tells of {count} batches, and its files hold another number")
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    return Incident(folder, about, batches, state, random_states, history)


def to_step(incident: Incident, module: Any, optimizers: list[Any]) -> RecordedStep:
    """The recorded step, with a module that was made anew.

    Args:
        module: Of the recorded class.

    Raises:
        DiagnosisError: If there is too little to run it again.
    """
    about = incident.about
    if incident.batches is None:
        raise DiagnosisError(f"The batches of {incident.folder} were not kept: {incident.left_out['batches']}")
    return RecordedStep(
        module=module,
        batches=incident.batches,
        random_states=[RandomState.from_state_dict(state) for state in incident.random_states],
        batch_indices=about["batch_indices"],
        losses=[float.fromhex(loss) for loss in about["losses"]],
        state=incident.state,
        optimizers=optimizers,
        trainer=about["trainer"],
        notes=about["notes"],
        environment=about["environment"],
        **{name: about[name] for name in _FROM_STEP},
    )


def _fill(
    part: Path,
    step: RecordedStep,
    history: list[dict[str, Any]],
    details: dict[str, Any],
    save_state: bool,
    left_out: dict[str, str],
) -> None:
    part.mkdir()
    device = next((p.device for p in step.module.parameters()), torch.device("cpu"))
    kept = ["random.pt", "history.jsonl"]
    _save([state.state_dict() for state in step.random_states], part / "random.pt")
    (part / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history), encoding="utf-8")
    kept += _try_to_save(part / "batches.pt", lambda: to_plain(step.batches, "batches"), left_out)
    if save_state:

        def state() -> State:
            return (step.state or capture_state(step.module, step.optimizers, copies=False)) | step.extra_state

        kept += _try_to_save(part / "state.pt", state, left_out)
    else:
        left_out["state"] = "it was not asked for (save_state=False)"
    optimizer: Any = step.optimizers[step.optimizer] if step.optimizers else None
    about = {
        "format": FORMAT,
        "schema": SCHEMA,
        "package": metadata.version("lightning-stability"),
        **{name: getattr(step, name) for name in _FROM_STEP},
        "losses": [loss.hex() for loss in step.losses],
        "batch_indices": step.batch_indices,
        "trainer": step.trainer,
        "notes": step.notes,
        "module": describe(step.module),
        "optimizer_class": None if optimizer is None else type(optimizer).__qualname__,
        "optimizer_options": [] if optimizer is None else [_options(group) for group in optimizer.param_groups],
        "environment": step.environment or capture_environment(device),
        "details": details,
        "left_out": left_out,
        "files": {name: {"bytes": (part / name).stat().st_size, "sha256": _sha256(part / name)} for name in kept},
    }
    about["digest"] = digest(about)
    (part / "incident.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def _save(content: Any, path: Path) -> None:
    """`torch.save` to an open file: to a path torch would hide what the operating system said."""
    with path.open("wb") as file:
        torch.save(content, file)


def _try_to_save(path: Path, make: Callable[[], Any], left_out: dict[str, str]) -> list[str]:
    """Save what loads again with `weights_only=True`; else say why not. Returns the file's name if it is there."""
    try:
        content = make()
        needed, free = _bytes_of(content), shutil.disk_usage(path.parent).free
        if free < needed + _SPARE_BYTES:
            raise OSError(f"{needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB free on the disk")
        _save(content, path)
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, NotPlainError, pickle.PickleError, TypeError, AttributeError) as error:
        path.unlink(missing_ok=True)
        left_out[path.stem] = str(error).splitlines()[0] or type(error).__name__
        return []
    return [path.name]


def _bytes_of(content: Any) -> int:
    if isinstance(content, torch.Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        return sum(_bytes_of(item) for item in content.values())
    return sum(_bytes_of(item) for item in content) if isinstance(content, (list, tuple)) else 0


def _options(group: dict[str, Any]) -> dict[str, Any]:
    plain = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in group.items()}
    return {n: v for n, v in plain.items() if n != "params" and isinstance(v, (int, float, str, bool, list, tuple))}


def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / "incident.json"
    if not path.is_file():
        inside = sorted(str(found.parent) for found in folder.glob("*/incident.json"))
        hint = f". These are: {', '.join(inside[:5])}" if inside else ""
        raise DiagnosisError(f"{folder} is no incident folder: expected a file incident.json in it{hint}")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DiagnosisError(f"{path} cannot be read: {error}. The folder is not as it was written") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise DiagnosisError(f"{path} is not an incident of lightning-stability")
    if about.get("schema") != SCHEMA:
        raise DiagnosisError(f"{path} has schema {about.get('schema')}; this version reads {SCHEMA}")
    if about.pop("digest", None) != digest(about):
        raise DiagnosisError(f"{path} was changed after it was written: its checksum differs")
    check_fields(about, str(path))
    return about


def _check_file(path: Path, size: int, checksum: str) -> None:
    if not path.is_file():
        raise DiagnosisError(f"{path} is missing. The folder is not as it was written")
    if path.stat().st_size != size:
        raise DiagnosisError(f"{path} has {path.stat().st_size} bytes; {size} were written. Was the copy cut short?")
    if _sha256(path) != checksum:
        raise DiagnosisError(f"{path} was changed after it was written: its checksum differs")


def _load(path: Path, kind: type) -> Any:
    try:
        content = from_plain(torch.load(path, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile, KeyError) as error:
        raise DiagnosisError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error
    if not isinstance(content, kind):
        raise DiagnosisError(f"{path} holds a {type(content).__name__}; expected a {kind.__name__}")
    return content


def _sha256(path: Path) -> str:
    checksum = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            checksum.update(block)
    return checksum.hexdigest()
