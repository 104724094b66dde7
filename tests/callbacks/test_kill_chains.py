"""Runs that are killed again and again, at random, in a write, at the end of fit: all end as if they had not been."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from lightning_stability.checkpointing import last_good_checkpoint, list_checkpoints
from tests import checkpoint_fit as fits
from tests.callbacks.test_fractional_checkpoint import assert_same, log, result

KILLS = int(os.environ.get("KILLS", "300"))
PARTS = 12
"""Tests that share them, so that they run side by side."""
SEED = int(os.environ.get("KILL_SEED", "0"))
PLAIN = ("plain", "plain", "plain weighted")
HOOKS = ("on_train_end", "on_fit_end", "teardown", "on_train_epoch_end", "on_validation_end", "on_save_checkpoint")


def settings(rng: random.Random) -> dict[str, Any]:
    """A run's options."""
    options: dict[str, Any] = {"max_epochs": 2, "data": rng.choice(["samples", "weighted", "stream", *PLAIN])}
    if rng.random() < 0.3:
        options.update(workers=2, augment=False)  # what workers draw is in no checkpoint
    checkpoint: dict[str, Any] = {
        "every_n_epochs": rng.choice([1 / 7, 0.3, 0.5, 1]),
        "save_top_k": rng.choice([1, 1, -1]),
        "async_save": rng.random() < 0.3,
    }
    if options["data"] == "stream":
        checkpoint["steps_per_epoch"] = 8
    if rng.random() < 0.25:
        options["module"] = {"manual": True}
    else:
        options["accumulate_grad_batches"] = rng.choice([1, 1, 2, 4])
    if rng.random() < 0.2 and "manual" not in options.get("module", {}):
        options["module"] = {**options.get("module", {}), "plateau": rng.choice(["step", "epoch"])}
    if rng.random() < 0.3 and options["data"] != "stream":
        options["val_check_interval"] = 3
    if rng.random() < 0.2:
        options.update(max_epochs=None, max_steps=5)
    options["extra"] = rng.choice([None, None, "ema", "early"])
    if options["extra"] == "early":
        options.update(max_epochs=5)
        options.pop("max_steps", None)  # it would want a metric before there is one
    elif rng.random() < 0.4:
        options["module"] = {**options.get("module", {}), "bad": rng.randrange(1, 13)}
    return {**options, "checkpoint": checkpoint}


def kill(rng: random.Random) -> dict[str, Any]:
    """Where a process is killed; a third in a write, a third at the end of fit or of something else."""
    kind = rng.randrange(3)
    if kind == 0:
        return {"kill_at_write": rng.randrange(1, 16)}
    return {"kill_in": rng.choice(HOOKS)} if kind == 1 else {"kill_after_batch": rng.randrange(1, 8)}


def chain(folder: Path, processes: fits.Fits, rng: random.Random) -> int:
    """Kill one run up to eight times; return how often it was killed."""
    options, bad = settings(rng), None
    bad = options.get("module", {}).get("bad")
    guard = (lambda patience: {"patience": patience}) if bad is not None else (lambda patience: {})
    reference, killed, kills = folder / "reference", folder / "killed", 0
    assert processes.run(reference, **options, **guard(1)) == 0, log(reference)
    what, patience = f"{options}\n", 0
    for attempt in range(20):
        path = last_good_checkpoint(killed / "checkpoints")
        resume = {"ckpt_path": str(path), "seed": 50 + attempt} if path else {}
        where = kill(rng) if attempt < 8 else {}
        what += f"{path and path.name} {where}\n"
        status = processes.run(killed, **options, **guard(patience), **resume, **where)
        assert status in (0, -9), what + log(killed)
        kills += status == -9
        infos = list_checkpoints(killed / "checkpoints", verify=True)
        assert all(info.is_good for info in infos), f"{what}{infos}"
        if status == 0:
            ends = [result(run)[key] for run in (killed, reference) for key in ("global_step", "epoch")]
            if ends[:2] == ends[2:]:
                break
            # it was stopped; where nothing was trained since the last checkpoint there is no other to resume from
            patience = int(last_good_checkpoint(killed / "checkpoints") == path)
    try:
        assert_same(result(killed), result(reference))
        if bad is None:
            assert fits.read_rows(killed) == fits.read_rows(reference)
            assert result(killed)["metrics"] == result(reference)["metrics"]
    except AssertionError as error:
        raise AssertionError(f"{what}{error}") from error
    return kills


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_chains_of_kills_end_as_runs_that_were_not_killed(tmp_path: Path, processes: fits.Fits, part: int) -> None:
    kills = chains = 0
    while kills < KILLS / PARTS:
        kills += chain(tmp_path / str(chains), processes, random.Random(f"{SEED}-{part}-{chains}"))
        chains += 1
    print(f"{kills} kills in {chains} chains")
