"""Fits on a disk that fails once, at each point in turn: run as a script, with `faults.c` preloaded."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from lightning_stability.checkpointing import last_good_checkpoint
from tests import checkpoint_fit as fits
from tests import runs

KINDS = ("fails", "disk full", "cut short", "half of it, then fails", "done, but said to have failed")
STEPS = 7  # of the one epoch, unless fewer are asked for; each is saved


def layer() -> Any:
    loaded = ctypes.CDLL(os.environ["LD_PRELOAD"])
    loaded.faults_hit.restype = ctypes.c_char_p
    return loaded


def module(pl: Any, **options: Any) -> Any:
    made = fits.make_module(pl, **options)
    made.register_buffer("large", torch.rand(2**19))  # 2 MB: several writes
    return made


def fit(folder: Path, step: int, point: int, kind: int, options: dict[str, Any]) -> dict[str, Any]:
    """One fit of `options["of"]` steps, whose save after `step` meets the fault; what came of it."""
    options = dict(options)
    of = options.pop("of", STEPS)
    faults, told, kept = layer(), {}, folder / "checkpoints"
    found: list[int] = []

    def callbacks(pl: Any) -> list[Any]:
        class Look(pl.Callback):
            def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
                trainer.checkpoint_callbacks[0]._finish_pending(trainer)  # which may be written in the background
                if batch_idx == step:
                    told.update(points=faults.faults_count(), hit=faults.faults_hit().decode())
                    faults.faults_arm(b"", 0, 0)
                if batch_idx:
                    found.append(look())
                if batch_idx == step - 1:
                    faults.faults_arm(str(kept).encode(), point, kind)

        return [Look()]

    def look() -> int:
        good = last_good_checkpoint(kept)
        assert good is not None, "there is no good checkpoint"
        return int(torch.load(good, weights_only=True, mmap=True)["global_step"])

    trainer = fits.fit(
        folder,
        max_epochs=1,
        max_steps=of,
        validate=False,
        module=module,
        checkpoint={"every_n_epochs": 1 / STEPS, "save_top_k": 1, **options},
        callbacks=callbacks,
    )
    if not told:  # it was the last save of all
        told.update(points=faults.faults_count(), hit=faults.faults_hit().decode())
        faults.faults_arm(b"", 0, 0)
    files = sorted(path.name for path in kept.iterdir())
    return {**told, "steps": trainer.global_step, "found": [*found, look()], "files": files}


def stop(folder: Path, step: int, point: int, kind: int, options: dict[str, Any]) -> dict[str, Any]:
    """A run that NaN stops after step 3, resumed, and stopped again after step 6, where it meets the fault."""
    faults, kept = layer(), folder / "checkpoints"

    def second(pl: Any) -> list[Any]:
        class Arm(pl.Callback):
            def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
                if faults.faults_count() == 0:  # nothing is saved before the stop
                    faults.faults_arm(str(kept).encode(), point, kind)

        return [Arm()]

    common = {"max_epochs": 1, "validate": False, "patience": 0, "checkpoint": {"every_n_epochs": 1.0, **options}}
    fits.fit(folder, module=lambda pl: module(pl, bad=2), **common)
    older = last_good_checkpoint(kept)
    fits.fit(folder, module=lambda pl: module(pl, bad=step), ckpt_path=str(older), callbacks=second, **common)
    told = {"points": faults.faults_count(), "hit": faults.faults_hit().decode()}
    faults.faults_arm(b"", 0, 0)
    good = last_good_checkpoint(kept)
    assert good is not None, "there is no good checkpoint"
    found = torch.load(good, weights_only=True)["global_step"]
    return {**told, "found": [found], "files": sorted(path.name for path in kept.iterdir())}


def main(root: Path, words: dict[str, Any]) -> None:
    """Print a line of JSON for each fit."""
    runs.load_namespace("pytorch_lightning")
    fits.import_what_a_fit_needs()
    run = stop if words.get("stop") else fit
    for step in words["steps"]:
        calls: dict[int, str] = {}  # which call each point is, known after the first kind
        for kind in words["kinds"]:
            point, points = 1, 1
            while point <= points:
                writes = {2: True, 3: True, 4: False}.get(kind)  # the kind is for writes only, or for all the others
                if writes is None or point not in calls or (calls[point] == "write") == writes:
                    result = in_a_child(run, root / f"{step}-{kind}-{point}", step, point, kind, words["options"])
                    points = result.get("points", 0)
                    calls.setdefault(point, result.get("hit", ""))
                    print(json.dumps({"step": step, "kind": KINDS[kind], "point": point, **result}), flush=True)
                point += 1
                points = max(points, len(calls))


def in_a_child(run: Callable[..., dict[str, Any]], folder: Path, *arguments: Any) -> dict[str, Any]:
    folder.mkdir()
    child = os.fork()
    if child == 0:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        try:
            result = run(folder, *arguments)
        except BaseException:
            result = {"error": traceback.format_exc()[-3000:]}
        (folder / "result.json").write_text(json.dumps(result))
        os._exit(0)
    os.waitpid(child, 0)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
