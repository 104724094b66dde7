"""Fingerprints of the steps after each save, in a small file beside the checkpoints, and how two runs of them differ.

A line opens the window of one save: what was saved and where it ran. A line for each step follows. Lines are appended
whole; one that a kill has cut short is passed over.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_stability.atomic import append, replace_file

STEPS = 20
"""How many steps after a save leave a fingerprint."""

_MAX_BYTES = 2**20
_MAX_LINE = 2**16
_SMALL = 1e-2
_KINDS = {"data": "data", "lr": "learning rate", "scale": "loss scale", "loss": "numerics", "bits": "numerics"}
_FIELDS = (*_KINDS, "norm")
"""What is compared, the first that differs naming the kind: other data makes another loss, and not the reverse."""
_STATE = {"weights": "weights", "optimizer": "optimizer state"}


@dataclass
class Window:
    """The steps after one save, as one run took them.

    Attributes:
        save: Which save.
        start: How often the run had been started.
        header: `weights` and `optimizer`, check sums; `environment`; `trainer`, its options.
        rows: By step after the save, from 1: `data`, `loss`, `lr`, `scale`, `norm`, as far as known.
    """

    save: str
    start: int
    header: dict[str, Any]
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """How many steps there are without a gap."""
        return next(n for n in range(len(self.rows) + 1) if n + 1 not in self.rows)


class StepFile:
    """The fingerprints that one rank writes.

    Args:
        folder: Of the checkpoints.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = fingerprint_file(folder, rank)
        self._key: dict[str, Any] = {}

    def begin(self, window: Window) -> None:
        """Begin a window; of a file that has grown large the older half goes.

        Raises:
            OSError: If it cannot be written.
        """
        self._key = {"save": window.save, "start": window.start}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file() and self.path.stat().st_size > _MAX_BYTES:
            newest = _newest_half(self.path.read_bytes())
            replace_file(self.path, lambda file: file.write(newest))
        self._append({"header": window.header})

    def add(self, n: int, fields: dict[str, Any]) -> None:
        """Add to what is known of the n-th step after the save.

        Raises:
            OSError: If it cannot be written.
        """
        self._append({"n": n, **{name: plain(value) for name, value in fields.items()}})

    def _append(self, line: dict[str, Any]) -> None:
        append(self.path, (json.dumps({**self._key, **line}, default=str) + "\n").encode())


def fingerprint_file(folder: Path, rank: int) -> Path:
    """Where a rank's fingerprints are."""
    return folder / ("steps.jsonl" if rank == 0 else f"steps.rank{rank}.jsonl")


def save_name(section: dict[str, Any]) -> str:
    """What tells a save from all others, from the section of its checkpoint."""
    return f"{section['run_id']} {section['saved_at']!r}"


def read_window(path: Path, save: str) -> Window | None:
    """The steps that were taken after a save; of several tries the one that got furthest, of these the newest.

    Args:
        path: A rank's file; None is returned if there is none.
        save: The save, as `save_name` names it.
    """
    windows: dict[Any, Window] = {}
    for line in _lines(path):
        if line.get("save") != save or not isinstance(line.get("start"), int):
            continue
        if isinstance(line.get("header"), dict):
            windows[line["start"]] = Window(save, line["start"], line["header"])
        elif isinstance(n := line.get("n"), int) and 0 < n <= STEPS and line["start"] in windows:
            rows = windows[line["start"]].rows.setdefault(n, {})
            rows.update({name: line[name] for name in _FIELDS if name in line})
    return max(windows.values(), key=lambda window: (window.steps, window.start), default=None)


@dataclass(frozen=True)
class Difference:
    """The first difference between two runs of the same steps.

    Attributes:
        kind: `"weights"`, `"optimizer state"`, `"data"`, `"learning rate"`, `"loss scale"`, `"numerics"` (small), or
            `"computation"` (not small).
        n: The step after the save; 0 for the state before the first.
        field: What differs.
        was: In the run that was killed.
        now: In the one that was resumed.
        ratio: The relative difference of the first losses or norms that differ, and of the last.
        changed: What is not as it was in the environment, such as `"threads: 2 -> 1"`.
    """

    kind: str
    n: int
    field: str = ""
    was: Any = None
    now: Any = None
    ratio: tuple[float, float] | None = None
    changed: tuple[str, ...] = ()


class Comparison:
    """Compares steps, as they come, with those of an earlier window.

    Args:
        header: Of the run that is compared with it.

    Example:
        >>> earlier = Window("a", 1, {"environment": {}}, {1: {"data": "00", "loss": 2.0}, 2: {"loss": 1.0}})
        >>> comparison = Comparison(earlier, {"environment": {}}, steps=2)
        >>> comparison.add(1, {"data": "00", "loss": 2.0})
        >>> comparison.difference() is None, comparison.equal
        (True, 1)
        >>> comparison.add(2, {"loss": 1.0000001})
        >>> comparison.difference().kind, comparison.equal
        ('numerics', 1)
    """

    def __init__(self, earlier: Window, header: dict[str, Any], steps: int) -> None:
        self.steps = steps
        self.earlier = earlier
        self._changed = changed(earlier.header.get("environment"), header.get("environment"))
        known = {name: kind for name, kind in _STATE.items() if earlier.header.get(name) is not None}
        self._state = next((kind for name, kind in known.items() if earlier.header[name] != header.get(name)), None)
        self._seen: set[int] = set()
        self._unequal: dict[int, dict[str, tuple[Any, Any]]] = {}
        self._ratios: list[tuple[int, float]] = []

    def add(self, n: int, fields: dict[str, Any]) -> None:
        """Compare what has become known of a step."""
        if n > self.steps:
            return
        before = self.earlier.rows.get(n, {})
        self._seen.add(n)
        for name in _FIELDS:
            if name not in fields or name not in before:
                continue
            was, now = before[name], plain(fields[name])
            if was == now:
                continue
            self._unequal.setdefault(n, {})[name] = (was, now)
            if name in ("loss", "norm") and (ratio := _ratio(was, now)) is not None:
                self._ratios.append((n, ratio))

    @property
    def equal(self) -> int:
        """How many of the steps that came were the same in every bit, up to the first that was not."""
        first = min(self._unequal, default=STEPS + 1)
        return sum(n < first for n in self._seen)

    @property
    def compared(self) -> int:
        """How many steps came."""
        return len(self._seen)

    def difference(self) -> Difference | None:
        """The first difference; None if there is none so far."""
        if self._state is not None:
            return Difference(self._state, 0, changed=self._changed)
        if not self._unequal:
            return None
        n = min(self._unequal)
        name = next(name for name in _FIELDS if name in self._unequal[n])
        was, now = self._unequal[n][name]
        ratios = [ratio for _, ratio in sorted(self._ratios)]
        kind = _KINDS.get(name, "numerics")
        if kind == "numerics" and ratios and not ratios[0] < _SMALL:
            kind = "computation"
        return Difference(kind, n, name, was, now, (ratios[0], ratios[-1]) if ratios else None, self._changed)


@dataclass(frozen=True)
class OtherBatches:
    """Why the steps of two runs cannot be compared: their batches are dealt out in other ways.

    Attributes:
        what: What changed.
        keeps_state: Whether each rank holds what it held.
    """

    what: str
    keeps_state: bool


def other_batches(header: dict[str, Any], dealing: dict[str, Any]) -> OtherBatches | None:
    """Whether the batches of a run are others by intention; None if they are not.

    Args:
        header: Of the earlier window.
        dealing: `batch_size` of each loader and the number of `processes` now.

    Example:
        >>> header = {"dealing": {"batch_size": [4], "processes": 1}}
        >>> other_batches(header, {"batch_size": [7], "processes": 1}).what
        'the batch size was 4 and is 7'
        >>> other_batches(header, {"batch_size": [4], "processes": 1}) is None
        True
    """
    before = header.get("dealing")
    if not isinstance(before, dict):
        return None
    if before.get("processes") != dealing["processes"]:
        return OtherBatches(
            f"the number of processes was {before.get('processes')} and is {dealing['processes']}", False
        )
    was, now = before.get("batch_size"), dealing["batch_size"]
    if not isinstance(was, list) or was == now:
        return None
    said = [", ".join("unknown" if size is None else str(size) for size in sizes) for sizes in (was, now)]
    return OtherBatches(f"the batch size was {said[0]} and is {said[1]}", True)


def changed(was: Any, now: Any) -> tuple[str, ...]:
    """What is not the same in two environments, each a dict of plain values or of such dicts.

    Example:
        >>> changed({"threads": 2, "settings": {"tf32": True}}, {"threads": 1, "settings": {"tf32": True}})
        ('threads: 2 -> 1',)
    """
    flat_was, flat_now = _flat(was), _flat(now)
    names = dict.fromkeys([*flat_was, *flat_now])
    return tuple(
        f"{name}: {flat_was.get(name)} -> {flat_now.get(name)}"
        for name in names
        if flat_was.get(name) != flat_now.get(name)
    )


def plain(value: Any) -> Any:
    """A value as JSON gives it back: numbers that are not finite are strings, tuples are lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _flat(tree: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items() if isinstance(tree, dict) else ():
        found.update(_flat(value) if isinstance(value, dict) else {name: value})
    return found


def _ratio(was: Any, now: Any) -> float | None:
    try:
        return abs(float(now) - float(was)) / max(abs(float(was)), 1e-30)
    except (TypeError, ValueError):
        return None


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            content = file.read(4 * _MAX_BYTES)
    except OSError:
        return []
    found = []
    for line in content.split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            parsed = json.loads(line) if len(line) <= _MAX_LINE else None
            if isinstance(parsed, dict):
                found.append(parsed)
    return found


def _newest_half(content: bytes) -> bytes:
    """From the first window that begins in the newer half."""
    lines = content[len(content) // 2 :].split(b"\n")[1:]
    first = next((place for place, line in enumerate(lines) if b'"header"' in line), len(lines))
    return b"\n".join(lines[first:])
