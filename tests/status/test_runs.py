"""What is said of real runs: processes that train, end, are stopped, raise and are killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins import MixedPrecision
from torch import nn

from lightning_stability import FractionalCheckpoint, GradNormMonitor, InputCheck, NaNEarlyStop, PrecisionFallback
from lightning_stability._compat import MisconfigurationException
from lightning_stability.events import FILE_NAME, EventLog, read_events
from lightning_stability.status import Report, Run, look, show_status
from lightning_stability.status.run import find_run
from tests import runs
from tests.command import ROOT, Done, Launcher, run
from tests.status.own import BadSamples, Data, Model, OutOfScale, TwoOptimizers

WORDS = (
    *(
        "fit",
        "--model=tests.status.own.Model",
        "--data=tests.status.own.Data",
        "--trainer.max_epochs=2",
        "--trainer.limit_train_batches=16",
    ),
    *("--trainer.limit_val_batches=2", "--trainer.log_every_n_steps=1", "--trainer.enable_model_summary=false"),
    *(
        "--trainer.enable_progress_bar=false",
        "--trainer.callbacks+=NaNEarlyStop",
        "--trainer.callbacks+=GradNormMonitor",
    ),
    *("--trainer.callbacks+=FractionalCheckpoint", "--trainer.callbacks.every_n_epochs=0.25"),
)
CSV = ("--trainer.logger=CSVLogger", "--trainer.logger.save_dir=.", "--trainer.logger.flush_logs_every_n_steps=1")


class Custom(MixedPrecision):
    """A plugin that PrecisionFallback does not know."""


def told(folder: Path, now: float | None = None) -> Report:
    found = Run(find_run(folder))
    found.update()
    found.close()
    return look(found, now)


def line(report: Report, name: str) -> str:
    return dict(report.lines).get(name, "")


def train(folder: Path, happens: str = "", model: Any = None, data: Any = None, **options: Any) -> Any:
    """Train in this process, 16 steps an epoch."""
    defaults: dict[str, Any] = {"max_epochs": 2, "limit_train_batches": 16, "limit_val_batches": 2}
    options = {**defaults, "enable_checkpointing": True, "logger": TensorBoardLogger(folder), **options}
    options.setdefault("callbacks", [NaNEarlyStop(patience=0), GradNormMonitor(), FractionalCheckpoint()])
    trainer = runs.trainer(pl, **options)
    model = model or Model(at=9, happens=happens, seconds=0.1 if happens == "slow" else 0.0)
    trainer.fit(model, data or Data())
    return trainer


def unasked(callback: Any) -> Any:
    """As it comes with the environment."""
    callback.automatic, callback.asked_for = True, False
    return callback


@pytest.fixture
def fit(command: Launcher, tmp_path: Path) -> Callable[..., Done]:
    return lambda *words: command(*WORDS, *words, cwd=tmp_path)


@pytest.mark.parametrize("logger", [TensorBoardLogger, CSVLogger])
def test_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], logger: Any) -> None:
    train(tmp_path, logger=logger(tmp_path))
    report = told(tmp_path)
    assert (report.state, report.needs_help, report.step, report.seconds_left) == ("finished", False, 32, None)
    assert line(report, "state").startswith("finished: max_epochs=2 reached")
    assert line(report, "progress") == "step 32 of 32 (100%), 2 of 2 epochs"
    assert re.fullmatch(r"[\d.e-]+ \(train_loss, step 32\)", line(report, "loss"))
    assert re.fullmatch(r"[\d.e-]+; .* over the last 32 logged", line(report, "gradient norm"))
    assert line(report, "validation").startswith("val_loss ")
    assert line(report, "precision") == "32-true"
    assert (line(report, "skipped updates"), line(report, "incidents")) == ("0", "0")
    assert "epoch=002.00-step=000032.ckpt, step 32, " in line(report, "last good checkpoint")
    capsys.readouterr()
    assert show_status(["status", str(tmp_path), "--watch"]) == 0
    said = capsys.readouterr().out
    assert "\033" not in said
    assert said.count("state                 finished: max_epochs=2 reached") == 1, "the watch ends with the run"


def test_a_run_that_nan_early_stop_ended(tmp_path: Path) -> None:
    train(tmp_path, "nan")
    report = told(tmp_path)
    assert (report.state, report.needs_help, report.step) == ("stopped", True, 10)
    assert line(report, "state").startswith("stopped early: NaNEarlyStop: the loss was nan (")
    assert line(report, "skipped updates") == "1"
    assert line(report, "incidents") == "1"
    assert "step 9  update skipped by guard: the loss was nan" in str(report)
    assert "nan_early_stop.ckpt, step 9" in line(report, "last good checkpoint")
    assert show_status(["status", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("happens", "options", "state", "said"),
    [
        ("stop", {}, "stopped", "stopped early: trainer.should_stop was set"),
        ("raise", {}, "failed", "failed: ValueError: on purpose ("),
        ("raise in validation", {}, "failed", "failed: ValueError: before training ("),
        ("interrupt", {}, "failed", "failed: KeyboardInterrupt"),
        ("", {"max_steps": 9}, "finished", "finished: max_steps=9 reached"),
        ("slow", {"max_time": {"seconds": 1}}, "stopped", "stopped early: Timer: max_time reached"),
        (
            "",
            {"callbacks": [EarlyStopping("val_loss", stopping_threshold=1e9), NaNEarlyStop(patience=0)]},
            "stopped",
            "stopped early: EarlyStopping: Stopping threshold reached: val_loss",
        ),
    ],
)
def test_a_run_that_ended_otherwise(
    tmp_path: Path, happens: str, options: dict[str, Any], state: str, said: str
) -> None:
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    raised: Any = {"raise": ValueError, "raise in validation": ValueError, "interrupt": SystemExit}
    context = pytest.raises(raised[happens]) if happens in raised else contextlib.nullcontext()
    with context:
        train(tmp_path, happens, **options)
    signal.signal(signal.SIGINT, on_ctrl_c)
    report = told(tmp_path)
    assert report.state == state
    assert line(report, "state").startswith(said)
    assert report.needs_help == (state == "failed")
    ends = [event for event in read_events(find_run(tmp_path)) if event["event"] == "training_ended"]
    assert len(ends) == 1


@pytest.mark.parametrize("callback", [NaNEarlyStop(patience=0), FractionalCheckpoint(), PrecisionFallback()])
def test_each_callback_alone_has_start_and_end_written_in_every_fit(tmp_path: Path, callback: Any) -> None:
    trainer = train(tmp_path, callbacks=[callback], max_epochs=1, plugins=runs.fp16(pl))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Model(), Data())
    names = [event["event"] for event in read_events(find_run(tmp_path))]
    assert [name for name in names if name.startswith("training")] == ["training_started", "training_ended"] * 2


def test_callbacks_that_nobody_asked_for_write_nothing(tmp_path: Path) -> None:
    guest = unasked(NaNEarlyStop(patience=0))
    train(tmp_path, callbacks=[guest])
    assert not list(tmp_path.rglob(FILE_NAME))
    report = told(tmp_path)
    assert report.state == "unknown"
    assert line(report, "gradient norm") == "not logged (GradNormMonitor does)"
    with pytest.raises(ValueError, match="on purpose"):
        train(tmp_path, "raise", callbacks=[guest])
    assert not list(tmp_path.rglob(FILE_NAME))


def test_a_run_that_was_refused_at_setup_leaves_no_events(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="does not know how to leave Custom"):
        train(tmp_path, callbacks=[NaNEarlyStop(patience=0), PrecisionFallback()], plugins=[Custom("16-mixed", "cpu")])
    assert not list(tmp_path.rglob(FILE_NAME))


def test_a_run_that_was_killed_and_one_that_goes_on_from_it(
    fit: Callable[..., Done], command: Launcher, tmp_path: Path
) -> None:
    done = fit("--model.happens=kill", "--model.at=9")
    assert done.returncode == -signal.SIGKILL
    report = told(tmp_path)
    assert (report.state, report.needs_help, report.step, report.seconds_left) == ("dead", True, 9, None)
    assert re.match(r"dead: process \d+ on \S+ is gone and has not said why", line(report, "state"))
    assert "step=000008.ckpt, step 8, " in line(report, "last good checkpoint")
    said = command("status", "lightning_logs", cwd=tmp_path)
    assert said.returncode == 1
    assert "state                 dead: process" in said.stdout
    assert fit("--ckpt_path=last_good").returncode == 0
    report = told(tmp_path)
    assert (report.state, report.step) == ("finished", 32)
    assert line(report, "run").endswith("version_1")
    [started] = [event for event in read_events(find_run(tmp_path)) if event["event"] == "training_started"]
    assert started["step"] == 8
    assert started["resumed_from"].endswith("step=000008.ckpt")


@pytest.mark.parametrize(
    "logger", [pytest.param((), id="tensorboard"), pytest.param(CSV, id="csv", marks=pytest.mark.slow)]
)
def test_a_run_that_writes_while_it_is_looked_at(
    fit: Callable[..., Done], tmp_path: Path, logger: tuple[str, ...]
) -> None:
    """The estimates of the end agree with the moment at which it comes."""
    thread = threading.Thread(target=fit, args=("--model.seconds=0.05", *logger))
    thread.start()
    seen, reports = None, []
    while thread.is_alive():
        time.sleep(0.05)
        if seen is None and list(tmp_path.rglob(FILE_NAME)):
            seen = Run(find_run(tmp_path))
        if seen is not None:
            seen.update()
            reports.append((time.time(), look(seen)))
    [*_, ended] = read_events(seen.folder)
    running = [(moment, report) for moment, report in reports if report.state == "running"]
    steps = [report.step for _, report in running]
    assert steps == sorted(steps)
    assert len(set(steps)) > 10
    estimates = [(moment, r.seconds_left) for moment, r in running if r.seconds_left is not None and r.step > 8]
    assert len(estimates) > 5
    for moment, left in estimates:
        assert left == pytest.approx(ended["time"] - moment, abs=1.0 + 0.5 * ended["seconds"])
    assert all(0 <= left < 3 * ended["seconds"] for _, left in estimates)
    for _, report in running:
        assert "running: process" in line(report, "state")
    assert look(seen).state == "finished"


def test_two_ranks_write_one_start_and_one_end(fit: Callable[..., Done], tmp_path: Path) -> None:
    done = fit("--trainer.devices=2", "--trainer.accelerator=cpu", "--trainer.strategy=ddp_fork")
    assert done.returncode == 0, done.stderr
    events = list(read_events(find_run(tmp_path)))
    assert [event["event"] for event in events if event["event"].startswith("training")] == [
        "training_started",
        "training_ended",
    ]
    assert {event["rank"] for event in events} == {0}
    assert events[0]["world_size"] == 2
    assert told(tmp_path).state == "finished"


@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp", marks=pytest.mark.slow)])
def test_of_two_ranks_the_second_fails_and_that_is_said(
    fit: Callable[..., Done], tmp_path: Path, strategy: str
) -> None:
    if strategy == "ddp":  # which starts the command anew
        fit = lambda *words: run(*WORDS, *words, cwd=tmp_path)  # noqa: E731
    ranks = ("--trainer.devices=2", "--trainer.accelerator=cpu", f"--trainer.strategy={strategy}")
    done = fit("--model.happens=raise on rank 1", "--model.at=9", *ranks)
    assert done.returncode != 0
    report = told(tmp_path)
    assert (report.state, report.needs_help) == ("failed", True)
    assert line(report, "state").startswith("failed: ValueError on rank 1: on purpose")


def test_a_rank_that_dies_before_rank_0_has_written_the_start_has_failed_all_the_same(tmp_path: Path) -> None:
    EventLog(tmp_path, rank=1).write(
        "training_ended", 0, 0, status="exception", why="on purpose", exception="ValueError", seconds=0.0
    )
    start(tmp_path)
    assert told(tmp_path).state == "failed"
    later = json.loads((tmp_path / FILE_NAME).read_text().splitlines()[1])
    later["time"] += 60.0  # it was started again
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write(json.dumps(later) + "\n")
    assert told(tmp_path).state == "running"


def start(folder: Path, **changes: Any) -> None:
    facts = {
        **{"pid": os.getpid(), "host": os.uname().nodename, "world_size": 1, "precision": "16-mixed"},
        **{"max_epochs": 4, "steps_per_epoch": 100, "total_steps": 400, "resumed_from": None},
        **{"callbacks": [], "unasked": []},
    }
    EventLog(folder).write("training_started", step=0, epoch=0, **{**facts, **changes})


def test_a_run_of_another_host_is_dead_only_when_it_has_been_silent_for_long(tmp_path: Path) -> None:
    start(tmp_path, host="node7", pid=1)
    report = told(tmp_path, now=time.time() + 500)
    assert (report.state, report.needs_help) == ("running", False)
    report = told(tmp_path, now=time.time() + 7200)
    assert (report.state, report.needs_help) == ("dead", True)
    assert re.match(
        r"dead, as it seems: process 1 on node7 has written nothing for 2 h. Only node7", line(report, "state")
    )


def test_a_process_that_hangs_is_running_and_said_to_be_silent(tmp_path: Path) -> None:
    start(tmp_path)
    report = told(tmp_path, now=time.time() + 7200)
    assert report.state == "running"
    assert line(report, "state").endswith("but nothing was written for 2 h")


def test_another_process_with_the_same_number_is_not_the_run(tmp_path: Path) -> None:
    start(tmp_path)
    events = tmp_path / FILE_NAME
    event = json.loads(events.read_text())
    events.write_text(json.dumps({**event, "time": time.time() - 1e7}) + "\n")
    assert told(tmp_path).state == "dead"


def test_incidents_and_the_change_of_precision_are_listed(tmp_path: Path) -> None:
    start(tmp_path)
    log = EventLog(tmp_path)
    log.write("update_skipped", 3, 0, by="GradScaler", ordinary=True, why="GradScaler halves its scale")
    log.write("gradient_norm_rising", 5, 0, norm=12.0, ratio=3.5, group="net", group_ratio=4.0)
    log.write("precision_changed", 7, 0, precision_from="16-mixed", precision_to="32-true", why="the loss was nan")
    log.write("checkpoint_refused", 8, 0, nonfinite=["a"], nonfinite_tensors=1)
    log.write("gradient_norm_rising", 9, 0, norm=float("inf"), ratio=3.5, group="net", group_ratio=4.0)
    log.write("something_new", 10, 0, why="a reason")
    report = told(tmp_path)
    assert line(report, "skipped updates") == "1, 1 of these by GradScaler, which is ordinary"
    assert line(report, "incidents") == "5"
    assert line(report, "precision") == "32-true since step 7, 16-mixed before"
    assert "step 9  gradient_norm_rising" in str(report)
    assert "step 10  something_new: a reason" in str(report)
    assert "step 3 " not in str(report)


def test_flagged_inputs_are_counted_on_a_line_of_their_own_and_are_no_incidents(tmp_path: Path) -> None:
    callbacks = [InputCheck(action="skip"), NaNEarlyStop(patience=0)]
    train(tmp_path, model=Model(), data=BadSamples(), callbacks=callbacks, max_epochs=1)
    report = told(tmp_path)
    assert re.fullmatch(
        r"2 batches \(skip\); the newest at [\d:]+, step 9, batch 9: batch: nonfinite", line(report, "flagged inputs")
    )
    assert line(report, "skipped updates") == "2, 2 of these by InputCheck, for flagged inputs"
    assert line(report, "incidents") == "0"
    assert line(report, "layers") == "", "nothing was warned of"


def test_the_warning_of_a_layer_that_is_out_of_scale_is_one_line(tmp_path: Path) -> None:
    model = Model()
    model.layer = nn.Sequential(OutOfScale(), model.layer)
    train(tmp_path, model=model, callbacks=[InputCheck()], max_steps=2)
    report = told(tmp_path)
    number = r"\d{2,3},\d{3}"
    assert re.fullmatch(
        rf"far from unit scale at the start: the input of layer\.1, deviation {number}, by layer\.0 \(x100,000\)",
        line(report, "layers"),
    )
    assert line(report, "incidents") == "0"


@pytest.mark.parametrize(
    ("callbacks", "logger", "every", "said"),
    [
        ([], TensorBoardLogger, 1, "not logged (GradNormMonitor does)"),
        ([GradNormMonitor()], TensorBoardLogger, 50, "not logged (GradNormMonitor has not yet"),
        ([unasked(GradNormMonitor())], TensorBoardLogger, 50, "not logged (GradNormMonitor has not yet"),
        (
            [unasked(GradNormMonitor())],
            CSVLogger,
            1,
            "not logged (GradNormMonitor does; unless it is asked for, only to",
        ),
    ],
)
def test_why_there_is_no_gradient_norm(tmp_path: Path, callbacks: Any, logger: Any, every: int, said: str) -> None:
    callbacks = [FractionalCheckpoint(), *callbacks]
    train(tmp_path, callbacks=callbacks, logger=logger(tmp_path), log_every_n_steps=every, max_epochs=1)
    assert line(told(tmp_path), "gradient norm").startswith(said)


def test_each_of_several_optimizers_has_its_gradient_norm(tmp_path: Path) -> None:
    train(tmp_path, model=TwoOptimizers(), callbacks=[GradNormMonitor()], max_epochs=1)
    number = r"[\d.e-]+; \S.* over the last 16 logged"
    norms = line(told(tmp_path), "gradient norm")
    assert re.fullmatch(f"optimizer_0 {number}, optimizer_1 {number}", norms)


def test_the_run_that_was_written_to_last_is_found_from_above(tmp_path: Path) -> None:
    for version, name in enumerate((FILE_NAME, FILE_NAME, "metrics.csv")):
        folder = tmp_path / "lightning_logs" / f"version_{version}"
        folder.mkdir(parents=True)
        (folder / name).write_text("")
        os.utime(folder / name, (1000 + version, 1000 + version))
    assert find_run(tmp_path).name == "version_1", "a run with events goes before one of `test`"
    os.utime(tmp_path / "lightning_logs" / "version_0" / FILE_NAME, (2000, 2000))
    assert find_run(tmp_path / "lightning_logs").name == "version_0"
    assert find_run(tmp_path / "lightning_logs" / "version_2").name == "version_2"
    assert find_run(tmp_path / "lightning_logs" / "version_1" / FILE_NAME).name == "version_1"


def test_a_reader_that_has_seen_enough_ends_it_quietly(tmp_path: Path) -> None:
    EventLog(str(tmp_path), 0).write("update_skipped", 3, 0, by="guard")
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does, only sooner
    words = [sys.executable, "-m", "lightning_stability", "status", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_that_is_no_run_is_one_clear_message(command: Launcher, tmp_path: Path) -> None:
    for words, message in (
        (["nowhere"], "There is no folder nowhere"),
        (["."], ". is no run, and there is none below it"),
    ):
        done = command("status", *words, cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
