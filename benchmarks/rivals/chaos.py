"""A run killed at each place of its second save, by the tool ckpt-chaos, and its verdict on what resumes.

Its own way to kill and its own rules are used; runs are forked rather than started, and save at the ends of epochs, as
its own trial of Lightning does. It kills before each change of a file, in the middle of what torch writes, and as if
what was not flushed were lost.
"""

from __future__ import annotations

import os
import re
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from common.children import in_a_child

from rivals.saves import FAULT, KILL, Way, fit

EPOCHS = 4
MODES = ("before", "torn", "unsynced")


class Armed(pl.Callback):
    """From before the second save until after it."""

    def __init__(self, folder: Path, at: int | None = None, mode: str = "before", events: str | None = None) -> None:
        self.folder, self.at, self.mode, self.events = folder, at, mode, events

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        from ckpt_chaos import inject  # type: ignore[import-not-found]

        if trainer.global_step == FAULT:
            inject.arm(str(self.folder), crash_at=self.at, mode=self.mode, log_path=self.events, torn_python=True)
        if trainer.global_step == KILL and self.at is not None:
            os._exit(9)


def judged(way: Way) -> dict[str, Any]:
    """The verdicts on all places of a save."""
    from ckpt_chaos.invariants import ResumeOutcome, classify  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as other:
        log, folder = Path(other) / "log", Path(other) / "checkpoints"
        folder.mkdir()
        whole = in_a_child(lambda: fit(way, folder, Armed(folder, events=str(log)), EPOCHS))
        places = places_of(log.read_text())
    verdicts: dict[str, str] = {}
    for mode, place in places:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "checkpoints"
            folder.mkdir()
            in_a_child(lambda: fit(way, folder, Armed(folder, place, mode), EPOCHS))  # noqa: B023
            newest = newest_whole(folder)
            resumed = in_a_child(lambda: fit(way, folder, None, EPOCHS))  # noqa: B023
        raised = resumed.get("raised") or ("killed" in resumed and "killed") or None
        differs = None if raised else float(resumed["weights"] != whole["weights"])
        verdicts[f"{mode} {place}"] = classify(ResumeOutcome(raised, resumed.get("began"), newest, differs))
    counts = Counter(verdicts.values())
    passed = counts.pop("PASS", 0)
    others = "".join(f", {count} {verdict}" for verdict, count in sorted(counts.items()))
    outcome = f"{passed} of {len(places)} PASS{others}"
    return {"outcome": outcome, "passed": passed, "of": len(places), "verdicts": verdicts}


def places_of(log: str) -> list[tuple[str, int]]:
    """Each change of a file, in each mode in which it can be cut off there."""
    from ckpt_chaos.runner import _events

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        path.write_text(log)
        events = [(number, tornable) for number, _, _, tornable in _events(path)]
    return [(mode, number) for mode in MODES for number, tornable in events if mode != "torn" or tornable]


def newest_whole(folder: Path) -> int:
    """The step of the newest checkpoint that can be read; 0 where names hold no step."""
    steps = [0]
    for path in folder.rglob("*.ckpt"):
        step = re.search(r"step=(\d+)", path.name)
        if step and zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip() is None:
            steps.append(int(step[1]))
    return max(steps)


def is_there() -> bool:
    """Whether the tool is installed."""
    import importlib.util

    return importlib.util.find_spec("ckpt_chaos") is not None
