"""FractionalCheckpoint: when it saves, what a resumed run becomes, what it keeps and what it refuses."""

from __future__ import annotations

import json
import math
import random
import shutil
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_stability import FractionalCheckpoint, GradNormMonitor
from lightning_stability._compat import MisconfigurationException
from lightning_stability.checkpointing import last_good_checkpoint, list_checkpoints
from lightning_stability.checkpointing.loops import SavePoints
from tests import checkpoint_fit as fits
from tests import runs

pl = runs.load_namespace("pytorch_lightning")


def fit(folder: Path, **options: Any) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fits.fit(folder, **options)


def saved(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("epoch=*.ckpt"))


def steps(folder: Path) -> list[int]:
    return [torch.load(path, weights_only=True)["global_step"] for path in saved(folder)]


def result(folder: Path, rank: int = 0) -> dict[str, Any]:
    return torch.load(folder / fits.RESULT.format(rank=rank), weights_only=True)


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in flat(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in flat(item)]
    return [value]


def assert_same(resumed: dict[str, Any], reference: dict[str, Any]) -> None:
    """Bit-equal weights, buffers, optimizer state and random state; the same batches; the same counts."""
    for key in ("module", "optimizers", "random", "global_step", "epoch"):
        ours, theirs = flat(resumed[key]), flat(reference[key])
        assert len(ours) == len(theirs), key
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, key
    assert resumed["proved"] is None or resumed["proved"][0], "steps that were the same are said to differ"
    count = len(resumed["seen"])
    assert resumed["seen"] == reference["seen"][len(reference["seen"]) - count :]


# Exact resumes, from every checkpoint of a run

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation that does not divide the epoch": {
        "accumulate_grad_batches": 4,
        "checkpoint": {"every_n_epochs": 0.3},
    },
    "validation in the epoch": {"val_check_interval": 0.5},
    "validation across epochs": {"val_check_interval": 3, "check_val_every_n_epoch": None},
    "no validation": {"validate": False},
    "unknown length": {"data": "stream", "checkpoint": {"steps_per_epoch": 8}},
    "unknown length, accumulation": {
        "data": "stream",
        "accumulate_grad_batches": 3,
        "checkpoint": {"steps_per_epoch": 3},
    },
    "sampler with a global order": {"data": "weighted"},
    "plain loader": {"data": "plain"},
    "plateau scheduler by step": {"module": {"plateau": "step"}, "val_check_interval": 0.5},
    "plateau scheduler by epoch": {"module": {"plateau": "epoch"}},
    "manual optimization": {"module": {"manual": True}},
    "in the background": {"checkpoint": {"async_save": True}},
    "limit_train_batches": {"limit_train_batches": 5},
    "loaders made anew each epoch": {"reload_dataloaders_every_n_epochs": 1},
}


def resume_from_all(paths: list[Path], reference: Path, options: dict[str, Any]) -> None:
    for path in paths:
        again = reference / "again"
        fit(again, ckpt_path=str(path), seed=99, **options)
        assert_same(result(again), result(reference))
        rows = []  # from the end there is nothing to log
        if (again / fits.ROWS).exists():
            rows = [json.loads(line) for line in (again / fits.ROWS).read_text().splitlines()]
        all_rows = [json.loads(line) for line in (reference / fits.ROWS).read_text().splitlines()]
        assert rows == all_rows[len(all_rows) - len(rows) :], path
        shutil.rmtree(again)


@pytest.mark.parametrize("name", CASES)
def test_resumed_from_any_of_its_checkpoints_a_run_ends_as_if_it_had_not_been_interrupted(
    tmp_path: Path, name: str
) -> None:
    options = {"max_epochs": 2, "checkpoint": {}, **CASES[name]}
    options["checkpoint"] = {"every_n_epochs": 0.4, **options["checkpoint"]}
    namespace = runs.NAMESPACES[len(name) % 2]
    fit(tmp_path / "reference", namespace=namespace, **options)
    assert len(saved(tmp_path / "reference")) >= 2
    resume_from_all(saved(tmp_path / "reference"), tmp_path / "reference", {"namespace": namespace, **options})


ENDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "max_steps inside an epoch": ({"max_epochs": None, "max_steps": 10}, {"max_epochs": None, "max_steps": 16}),
    "max_steps at a border": ({"max_epochs": None, "max_steps": 7}, {"max_epochs": None, "max_steps": 16}),
    "max_epochs": ({"max_epochs": 1}, {"max_epochs": 2}),
    "limit_train_batches": ({"max_epochs": 1, "limit_train_batches": 5}, {"max_epochs": 2, "limit_train_batches": 5}),
    "unknown length": (
        {"max_epochs": None, "max_steps": 10, "data": "stream"},
        {"max_epochs": None, "max_steps": 18, "data": "stream"},
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_run_goes_on_from_its_end_as_one_that_was_longer_from_the_start(tmp_path: Path, name: str) -> None:
    short, long = ENDS[name]
    checkpoint = {"every_n_epochs": 5, "steps_per_epoch": 8}
    fit(tmp_path / "long", checkpoint=checkpoint, **long)
    fit(tmp_path / "short", checkpoint=checkpoint, **short)
    assert len(saved(tmp_path / "short")) == 1, "the end of fit is always saved"
    resume_from_all(saved(tmp_path / "short"), tmp_path / "long", {"checkpoint": checkpoint, **long})


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_run_goes_on_from_an_early_stop_even_inside_an_accumulation_window(tmp_path: Path, accumulation: int) -> None:
    def stop(pl: Any) -> list[Any]:
        class Stop(pl.Callback):
            def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
                trainer.should_stop = trainer.max_epochs == 9 and trainer.global_step >= 2

        return [Stop()]

    options = {"accumulate_grad_batches": accumulation, "val_check_interval": 3, "checkpoint": {"every_n_epochs": 5}}
    fit(tmp_path / "long", max_epochs=2, callbacks=stop, **options)
    trainer = fit(tmp_path / "short", max_epochs=9, callbacks=stop, **options)
    assert trainer.fit_loop.epoch_loop.batch_progress.current.ready in (3, 6)
    resume_from_all(saved(tmp_path / "short"), tmp_path / "long", {"max_epochs": 2, "callbacks": stop, **options})


def test_early_stopping_and_monitored_metrics_go_on(tmp_path: Path) -> None:
    def early_stopping(pl: Any) -> list[Any]:
        by_epoch = pl.callbacks.EarlyStopping("train_loss_epoch", check_on_train_epoch_end=True)
        return [pl.callbacks.EarlyStopping("val_loss", patience=2), by_epoch]

    options = {"callbacks": early_stopping, "val_check_interval": 0.5, "max_epochs": 20}
    options["checkpoint"] = {"every_n_epochs": 0.5}
    fit(tmp_path, **options)
    assert result(tmp_path)["epoch"] < 20
    resume_from_all(saved(tmp_path)[:-1], tmp_path, options)  # the last would train on, as in Lightning


# Killed processes

KILLED: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 4},
    "two workers": {"workers": 2, "augment": False},
    "plain loader, two workers": {"data": "plain", "workers": 2, "augment": False, "val_check_interval": 3},
    "unknown length": {"data": "stream", "checkpoint": {"steps_per_epoch": 8}},
    "in the background": {"checkpoint": {"async_save": True}, "val_check_interval": 0.5},
    "two ranks": {"ranks": 2, "data": "ranks", "augment": False, "validate": False},
    "two ranks, plain, weighted": {"ranks": 2, "data": "plain weighted ranks", "augment": False, "validate": False},
}


FAST = ("plain", "plain loader, two workers", "in the background", "two ranks, plain, weighted")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in KILLED])
def test_a_killed_run_resumed_from_its_newest_checkpoint_ends_as_one_that_was_not_killed(
    tmp_path: Path, processes: fits.Fits, name: str
) -> None:
    options = {"max_epochs": 2, **KILLED[name]}
    options["checkpoint"] = {"every_n_epochs": 0.3, "save_top_k": 1, **options.get("checkpoint", {})}
    run = ranked(processes) if "ranks" in options else processes.run
    assert run(tmp_path / "reference", **options) == 0, log(tmp_path / "reference")
    killed = tmp_path / "killed"
    for kill_after_batch in (4, 3, 5, None):
        ckpt_path = last_good_checkpoint(killed / "checkpoints")
        # in the background nothing may be there yet: then it begins again, with the seed that it began with
        resume = {"ckpt_path": str(ckpt_path), "seed": 50} if ckpt_path else {}
        status = run(killed, kill_after_batch=kill_after_batch, **resume, **options)
        assert status == (0 if kill_after_batch is None else -9), log(killed)
        assert all(info.is_good for info in list_checkpoints(killed / "checkpoints", verify=True))
    for rank in range(options.get("ranks", 1)):
        assert_same(result(killed, rank), result(tmp_path / "reference", rank))
    assert fits.read_rows(killed) == fits.read_rows(tmp_path / "reference")


def test_ranks_share_out_every_epoch_and_each_goes_on_from_its_own_place(tmp_path: Path, processes: fits.Fits) -> None:
    options = {"data": "ranks", "augment": False, "validate": False, "max_epochs": 2, "ranks": 2}
    run = ranked(processes)
    assert run(tmp_path, **options) == 0, log(tmp_path)
    seen = [result(tmp_path, rank)["seen"] for rank in range(2)]
    for epoch in range(2):
        samples = [index for rank in seen for batch in rank[7 * epoch : 7 * epoch + 7] for index in batch]
        assert sorted(samples) == list(range(56))
    assert seen[0][:7] != seen[0][7:]


def ranked(processes: fits.Fits) -> Any:
    def run(folder: Path, **options: Any) -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            options["port"] = probe.getsockname()[1]
        return processes.run(folder, **options)

    return run


def log(folder: Path) -> str:
    return "".join(path.read_text()[-3000:] for path in sorted(folder.glob("log-*.txt")))


def storm(tmp_path: Path, processes: fits.Fits, kills: int, async_save: bool) -> None:
    """Kill at random moments, mostly in saves: they come at every step, and their files are large for the model."""
    import os
    import signal
    import time

    options = {
        "max_epochs": 10_000,
        "validate": False,
        "checkpoint": {"every_n_epochs": 1 / 7, "save_top_k": 1, "async_save": async_save},
    }
    folder, newest, parts = tmp_path, -1, 0
    for kill in range(kills):
        path = last_good_checkpoint(folder / "checkpoints")
        pid = processes.start(folder, ckpt_path=None if path is None else str(path), seed=kill, **options)
        started = time.monotonic()
        while time.monotonic() - started < 300:  # until it saves
            newer = [info.step or 0 for info in list_checkpoints(folder / "checkpoints") if info.is_good]
            if newer and max(newer) > newest:
                break
            time.sleep(0.01)
        time.sleep(random.Random(kill).uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert processes.wait() == -9, log(folder)
        parts += bool(list((folder / "checkpoints").glob(".*.part")))
        infos = list_checkpoints(folder / "checkpoints", verify=True)
        assert infos
        assert all(info.is_good for info in infos), infos
        reached = max(info.step or 0 for info in infos)
        assert reached > newest, "what was listed is lost, or the run makes no progress"
        newest = reached
        assert len(infos) <= 6, "what killed runs left is not deleted"
    print(f"{kills} kills, {parts} of them while a file was half written, {newest} steps")


@pytest.mark.parametrize("async_save", [False, True])
def test_killed_at_random_moments_all_that_is_listed_loads_and_nothing_is_lost(
    tmp_path: Path, processes: fits.Fits, async_save: bool
) -> None:
    storm(tmp_path, processes, kills=5, async_save=async_save)


@pytest.mark.slow
@pytest.mark.parametrize("async_save", [False, True])
def test_killed_a_hundred_times(tmp_path: Path, processes: fits.Fits, async_save: bool) -> None:
    storm(tmp_path, processes, kills=100, async_save=async_save)


# When


@pytest.mark.parametrize(
    ("every", "options", "expected"),
    [
        (0.25, {}, [2, 4, 6, 7, 9, 11, 13, 14]),
        (0.3, {}, [3, 5, 7, 9, 11, 13, 14]),
        (1.5, {}, [11, 14]),
        (0.01, {}, list(range(1, 15))),
        (0.25, {"accumulate_grad_batches": 4}, [1, 2, 3, 4]),
        (0.5, {"limit_train_batches": 5}, [3, 5, 8, 10]),
        (0.5, {"data": "stream", "checkpoint": {"steps_per_epoch": 8}}, [4, 8, 12, 16]),
        (0.5, {"data": "stream", "checkpoint": {"steps_per_epoch": 5}}, [3, 5, 11, 13, 16]),
    ],
)
def test_saves_at_the_first_optimizer_step_at_or_after_each_fraction(
    tmp_path: Path, every: float, options: dict[str, Any], expected: list[int]
) -> None:
    options = {**options, "checkpoint": {"every_n_epochs": every, **options.get("checkpoint", {})}}
    fit(tmp_path, max_epochs=2, **options)
    assert steps(tmp_path) == expected


def test_a_save_comes_after_the_validation_of_its_step_and_carries_its_metrics(tmp_path: Path) -> None:
    options = {"every_n_epochs": 3 / 7, "filename": "{epoch}-{step:06d}-{val_loss:.6f}"}
    trainer = fit(tmp_path, max_epochs=1, val_check_interval=3, checkpoint=options)
    rows = [json.loads(line) for line in (tmp_path / fits.ROWS).read_text().splitlines()]
    validated = [row["val_loss"] for _, row in rows if "val_loss" in row]
    assert [path.name.rsplit("=")[-1] for path in saved(tmp_path)][:2] == [f"{loss:.6f}.ckpt" for loss in validated]
    assert trainer.callback_metrics["val_loss"] == validated[-1]


def test_names_sort_in_time_order_and_hold_the_cumulative_epoch(tmp_path: Path) -> None:
    fit(tmp_path, max_epochs=2, checkpoint={"every_n_epochs": 0.5})
    assert [path.name for path in saved(tmp_path)] == [
        "epoch=000.57-step=000004.ckpt",
        "epoch=001.00-step=000007.ckpt",
        "epoch=001.57-step=000011.ckpt",
        "epoch=002.00-step=000014.ckpt",
    ]


# What is kept


def logging_values(values: list[float]) -> dict[str, Any]:
    """A module's options whose monitored metric takes these values, one a step."""

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        self.log("score", values[self.trainer.global_step])
        return self.net(batch[0]).pow(2).mean()

    return {"training_step": training_step}


def train(folder: Path, callback: Any, count: int = 8, trainer: dict[str, Any] | None = None, **overrides: Any) -> Any:
    module = runs.make_module(pl, on_before_optimizer_step=lambda self, optimizer: None, **overrides)
    options = {"enable_checkpointing": True, "callbacks": [callback], **(trainer or {})}
    made = runs.trainer(pl, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.fit(module, runs.data(2 * count))
    made.warned = [str(warning.message) for warning in caught if "FractionalCheckpoint" in str(warning.message)]
    return made


def kept_steps(folder: Path) -> list[int]:
    return sorted(info.step for info in list_checkpoints(folder) if not info.path.name.startswith("last"))


def test_kept_are_the_best_and_the_newest(tmp_path: Path) -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0, 6.0, 7.0, 8.0]
    callback = FractionalCheckpoint(1 / 8, dirpath=tmp_path, monitor="score", save_top_k=2)
    train(tmp_path, callback, **logging_values(values))
    assert kept_steps(tmp_path) == [2, 4, 8]
    assert callback.best_model_score == 1.0
    assert torch.load(callback.best_model_path)["global_step"] == 2
    assert sorted(float(score) for score in callback.best_k_models.values()) == [1.0, 2.0]
    assert torch.load(tmp_path / "last.ckpt")["global_step"] == 8


def test_a_metric_that_is_nan_never_ranks_as_best_in_either_mode(tmp_path: Path) -> None:
    nan = math.nan
    for mode, best in (("min", 3), ("max", 5)):
        callback = FractionalCheckpoint(1 / 8, dirpath=tmp_path / mode, monitor="score", mode=mode)
        train(tmp_path, callback, **logging_values([nan, nan, 2.0, nan, 5.0, nan, nan, nan]))
        assert kept_steps(tmp_path / mode) == [best, 8]
        assert torch.load(callback.best_model_path)["global_step"] == best


def test_a_metric_ranks_one_checkpoint_only_also_over_a_resume(tmp_path: Path) -> None:
    """A validation half an epoch old says nothing about the weights of now."""
    options = {"every_n_epochs": 2 / 7, "monitor": "val_loss", "save_top_k": -1}
    fit(tmp_path / "a", max_epochs=2, checkpoint=options)
    [ranked] = [list(torch.load(saved(tmp_path / "a")[-1])["callbacks"].values())]
    whole = {Path(path).name for path in ranked[0]["best_k_models"]}
    assert whole == {"epoch=001.14-step=000008.ckpt", "epoch=002.00-step=000014.ckpt"}
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    [middle] = [path for path in saved(tmp_path / "a") if "001.42" in path.name]
    for path in saved(tmp_path / "a"):
        if path.name > middle.name:
            path.unlink()
    trainer = fit(tmp_path / "a", max_epochs=2, checkpoint=options, ckpt_path=str(middle), seed=9)
    [callback] = trainer.checkpoint_callbacks
    assert {Path(path).name for path in callback.best_k_models} == whole


def test_a_metric_that_is_never_logged_is_called_out(tmp_path: Path) -> None:
    made = train(tmp_path, FractionalCheckpoint(1 / 2, dirpath=tmp_path, monitor="val_los"))
    assert [warning for warning in made.warned if "val_los" in warning and "nothing of that name" in warning]


@pytest.mark.parametrize(("save_top_k", "expected"), [(1, [8]), (0, [8]), (-1, list(range(1, 9)))])
def test_without_a_monitor_the_newest_or_all_are_kept(tmp_path: Path, save_top_k: int, expected: list[int]) -> None:
    train(tmp_path, FractionalCheckpoint(1 / 8, dirpath=tmp_path, save_top_k=save_top_k))
    assert kept_steps(tmp_path) == expected


def poison(where: str, at: int) -> dict[str, Any]:
    def on_train_batch_end(self: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step >= at:
            state = self.trainer.optimizers[0].state[self.net.head.weight]
            tensor = {"weight": self.net.head.weight, "buffer": self.running, "optimizer": state["exp_avg_sq"]}[where]
            tensor.data.view(-1)[0] = math.nan

    def setup(self: Any, stage: str) -> None:
        self.register_buffer("running", torch.zeros(2))
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    return {"on_train_batch_end": on_train_batch_end, "setup": setup}


@pytest.mark.parametrize("where", ["weight", "buffer", "optimizer"])
def test_what_is_not_finite_is_not_saved_and_last_stays_the_newest_good_one(tmp_path: Path, where: str) -> None:
    logger = pl.loggers.CSVLogger(tmp_path)
    callback = FractionalCheckpoint(1 / 4)
    made = train(tmp_path, callback, trainer={"logger": logger}, **poison(where, at=5))
    folder = Path(callback.dirpath)
    assert [info.step for info in list_checkpoints(folder, verify=True)] == [4, 4]
    assert all(info.is_good for info in list_checkpoints(folder, verify=True)), "the mask is so by design"
    events = runs.incidents(logger.log_dir)
    assert [(e["event"], e["step"]) for e in events] == [
        ("checkpoint_saved", 2),
        ("checkpoint_saved", 4),
        ("checkpoint_refused", 6),
        ("checkpoint_refused", 8),
    ]
    name = {"weight": "net.head.weight", "buffer": "running", "optimizer": "exp_avg_sq"}[where]
    assert name in str(events[2]["nonfinite"])
    refusals = [warning for warning in made.warned if "nothing was saved" in warning]
    assert "step=000004" in refusals[0]


def test_a_failed_save_warns_goes_on_and_tries_again_and_three_in_a_row_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for async_save in (False, True):
        folder, broken_at = tmp_path / str(async_save), {2, 3, 5}
        callback = FractionalCheckpoint(1 / 8, dirpath=folder, async_save=async_save, save_top_k=2, monitor="score")
        breaker = breaking(folder, broken_at)
        made = train(folder, callback, trainer={"callbacks": [callback, breaker]}, **logging_values([1.0] * 8))
        assert made.global_step == 8
        assert len(made.warned) >= 3
        assert 8 in kept_steps(folder)
        assert not broken_at & set(kept_steps(folder))
        assert not broken_at & {torch.load(path)["global_step"] for path in callback.best_k_models}
        again = FractionalCheckpoint(1 / 8, dirpath=folder / "again", async_save=async_save, save_top_k=-1)
        with pytest.raises(RuntimeError, match="3 saves in a row failed"):
            train(folder, again, trainer={"callbacks": [again, breaking(folder / "again", {3, 4, 5, 6, 7, 8})]})
        assert kept_steps(folder / "again") == [1, 2]


def breaking(folder: Path, at: set[int]) -> Any:
    """A callback that has a folder stand where the checkpoints of some steps would be written."""
    from lightning_stability import atomic

    class Break(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            for step in at:
                epochs = math.floor(step / 8 * 1000) / 1000
                part = atomic.part_path(folder / f"epoch={epochs:07.3f}-step={step:06d}.ckpt")
                (part / "in the way").mkdir(parents=True, exist_ok=True)

        def on_train_start(self, trainer: Any, *args: Any) -> None:
            self.delete, atomic.delete = atomic.delete, lambda path: None

        def on_train_end(self, *args: Any) -> None:
            atomic.delete = self.delete

        def on_exception(self, *args: Any) -> None:
            atomic.delete = self.delete

    return Break()


def test_an_asynchronous_save_is_complete_when_fit_returns_and_when_it_raises(tmp_path: Path) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 5:
            raise KeyError("mine")
        return self.net(batch[0]).pow(2).mean()

    train(tmp_path, FractionalCheckpoint(1 / 8, dirpath=tmp_path / "a", async_save=True))
    assert kept_steps(tmp_path / "a") == [8]
    with pytest.raises(KeyError, match="mine"):
        train(
            tmp_path,
            FractionalCheckpoint(1 / 8, dirpath=tmp_path / "b", async_save=True),
            training_step=training_step,
        )
    assert kept_steps(tmp_path / "b") == [5]
    assert all(info.is_good for info in list_checkpoints(tmp_path / "b", verify=True))


def test_rotation_goes_on_after_a_resume_and_a_second_run_overwrites_nothing(tmp_path: Path) -> None:
    options = {"every_n_epochs": 0.5, "save_top_k": 1}
    fit(tmp_path, max_epochs=1, checkpoint=options)
    first = last_good_checkpoint(tmp_path / "checkpoints")
    fit(tmp_path, max_epochs=2, checkpoint=options, ckpt_path=str(first), seed=5)
    assert [path.name for path in saved(tmp_path)] == [first.name, "epoch=002.00-step=000014.ckpt"], (
        "what a user resumed from is left alone, as in ModelCheckpoint"
    )
    fit(tmp_path, max_epochs=1, checkpoint=options)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert "last-v1.ckpt" in names
    assert "epoch=001.00-step=000007-v1.ckpt" in names
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 14


def test_remote_file_systems_work(tmp_path: Path) -> None:
    import fsspec

    folder = f"memory://{tmp_path.name}/run"
    train(tmp_path, FractionalCheckpoint(1 / 4, dirpath=folder))
    names = [name.rsplit("/", 1)[1] for name in fsspec.filesystem("memory").ls(f"/{tmp_path.name}/run", detail=False)]
    assert sorted(names) == ["epoch=001.00-step=000008.ckpt", "last.ckpt"]


# What is refused, and what is said


@pytest.mark.parametrize(
    "options",
    [
        {"every_n_train_steps": 10},
        {"train_time_interval": 1},
        {"save_on_train_epoch_end": True},
        {"every_n_epochs": 0},
        {"every_n_epochs": -0.5},
        {"every_n_epochs": math.nan},
        {"every_n_epochs": math.inf},
        {"every_n_epochs": True},
        {"every_n_epochs": "0.25"},
        {"steps_per_epoch": 0},
    ],
)
def test_another_trigger_or_an_interval_out_of_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=next(iter(options))):
        FractionalCheckpoint(**options)


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="nonsense"):
        FractionalCheckpoint(nonsense=1)


@pytest.mark.parametrize("namespace", runs.NAMESPACES)
def test_data_of_unknown_length_is_refused_before_the_first_batch_with_the_hint(tmp_path: Path, namespace: str) -> None:
    with pytest.raises(MisconfigurationException, match="steps_per_epoch"):
        fit(tmp_path, data="stream", namespace=namespace)
    assert not (tmp_path / fits.ROWS).exists()


def test_data_without_a_position_is_warned_of_once_and_a_plain_loader_is_not(tmp_path: Path) -> None:
    said = []
    for options in ({"data": "plain"}, {"data": "plain unstateful"}, {"data": "plain unstateful", "skips": True}):
        checkpoint = {"steps_per_epoch": 8, "skip_by_loading": options.pop("skips", False)}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fits.fit(tmp_path, max_epochs=1, checkpoint=checkpoint, **options)
        said.append([str(w.message) for w in caught if "FractionalCheckpoint" in str(w.message)])
    assert [len(messages) for messages in said] == [0, 1, 0]
    assert "StatefulDataLoader" in said[1][0]
    assert "skip_by_loading" in said[1][0]


def test_is_a_checkpoint_callback_in_both_namespaces_and_brings_no_second_one(tmp_path: Path) -> None:
    for name in runs.NAMESPACES:
        library = runs.load_namespace(name)
        trainer = runs.trainer(library, enable_checkpointing=True, callbacks=[FractionalCheckpoint(dirpath=tmp_path)])
        [callback] = trainer.checkpoint_callbacks
        assert isinstance(callback, FractionalCheckpoint)


def test_a_checkpoint_loads_with_weights_only_and_in_a_trainer_without_the_callback(tmp_path: Path) -> None:
    fit(tmp_path, max_epochs=1, workers=2, augment=False)
    [path] = [path for path in saved(tmp_path) if "000.57" in path.name]
    torch.load(path, weights_only=True)
    torch.manual_seed(0)
    module = fits.make_module(pl)
    trainer = runs.trainer(pl, max_epochs=2)
    trainer.fit(module, fits.loader("samples", 0, False), ckpt_path=last_good_checkpoint(tmp_path / "checkpoints"))
    assert trainer.global_step == 14


def test_a_checkpoint_of_model_checkpoint_goes_on_with_the_callback(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "checkpoints")
    trainer = runs.trainer(pl, max_epochs=1, enable_checkpointing=True, callbacks=[plain])
    trainer.fit(fits.make_module(pl), fits.loader("samples", 0, False))
    again = fit(tmp_path, max_epochs=2, ckpt_path=str(last_good_checkpoint(tmp_path / "checkpoints")))
    assert again.global_step == 14
    assert 14 in steps(tmp_path)


def test_the_order_of_callbacks_changes_nothing(tmp_path: Path) -> None:
    contents = []
    for index, order in enumerate((1, -1)):
        folder = tmp_path / str(index)
        saver = FractionalCheckpoint(0.5, dirpath=folder)
        callbacks = [saver, GradNormMonitor(), pl.callbacks.LearningRateMonitor()][::order]
        train(folder, saver, trainer={"callbacks": callbacks, "logger": runs.memory_logger(pl)})
        checkpoint = torch.load(folder / "last.ckpt")
        contents.append({key: checkpoint[key] for key in ("state_dict", "optimizer_states", "loops")})
        [state] = [s for key, s in checkpoint["callbacks"].items() if "GradNormMonitor" in key]
        contents[-1]["monitor"] = state
    assert all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(flat(contents[0]), flat(contents[1]), strict=True)
    )


def test_two_of_them_work_side_by_side_and_the_trainer_is_left_as_it_was(tmp_path: Path) -> None:
    first = FractionalCheckpoint(0.5, dirpath=tmp_path / "a", save_top_k=-1)
    second = FractionalCheckpoint(1, dirpath=tmp_path / "b", save_top_k=-1)
    trainer = train(tmp_path, first, trainer={"callbacks": [first, second]})
    assert kept_steps(tmp_path / "a") == [4, 8]
    assert kept_steps(tmp_path / "b") == [8]
    for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop):
        assert not [name for name, value in vars(loop).items() if getattr(value, "__name__", "") == "stand_in"]


def test_fast_dev_run_saves_nothing(tmp_path: Path) -> None:
    train(tmp_path, FractionalCheckpoint(0.1, dirpath=tmp_path / "none"), trainer={"fast_dev_run": 3})
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("namespace", runs.NAMESPACES)
def test_lightning_has_what_we_touch(namespace: str, tmp_path: Path) -> None:
    """Each private name of Lightning's, in both namespaces: a version without one shows here."""
    library = runs.load_namespace(namespace)
    trainer = runs.trainer(library)
    fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    for owner, names in (
        (fit_loop, ("_combined_loader", "_data_fetcher", "_last_train_dl_reload_epoch", "_can_stop_early")),
        (fit_loop, ("_resuming_from_checkpoint", "_restarting", "update_restart_stage", "reset_restart_stage")),
        (fit_loop, ("on_advance_start", "on_advance_end", "epoch_progress", "is_resuming")),
        (epoch_loop, ("_results", "_on_before_fetch", "on_run_start", "on_advance_end", "reset", "batch_progress")),
        (epoch_loop, ("_num_ready_batches_reached", "_should_accumulate", "reset_restart_stage", "_restarting")),
        (trainer._logger_connector, ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")),
        (trainer._logger_connector, ("_first_loop_iter", "_current_fx")),
        (trainer._checkpoint_connector, ("dump_checkpoint",)),
        (FractionalCheckpoint(), ("_should_remove_checkpoint", "_enable_version_counter", "file_exists")),
    ):
        for name in names:
            assert hasattr(owner, name), f"{type(owner).__name__}.{name}"
    assert SavePoints.of(trainer) is SavePoints.of(trainer)
