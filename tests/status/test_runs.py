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
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins import MixedPrecision
from torch import nn

from lightning_stability import FractionalCheckpoint, GradNormMonitor, InputCheck, NaNEarlyStop, PrecisionFallback
from lightning_stability._compat import MisconfigurationException
from lightning_stability.events import FILE_NAME, PREVIOUS_FILE_NAME, EventLog, read_events
from lightning_stability.status import Report, Run, look, show_status
from lightning_stability.status.run import NoRunError, find_run
from tests import runs
from tests.command import ROOT, Done, Launcher, run
from tests.status.own import BadSamples, Data, Model, OutOfScale, Progress, TwoOptimizers

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
    "--trainer.callbacks+=tests.status.own.Progress",
)


class Custom(MixedPrecision):
    """A plugin that PrecisionFallback does not know."""


def told(folder: Path, now: float | None = None) -> Report:
    return look(Run(find_run(folder)), now)


def line(report: Report, name: str) -> str:
    return dict(report.lines).get(name, "")


def train(folder: Path, happens: str = "", model: Any = None, data: Any = None, **options: Any) -> Any:
    """Train in this process, 16 steps an epoch."""
    defaults: dict[str, Any] = {"max_epochs": 2, "limit_train_batches": 16, "limit_val_batches": 2}
    options = {**defaults, "enable_checkpointing": True, "logger": TensorBoardLogger(folder), **options}
    options.setdefault("callbacks", [NaNEarlyStop(patience=0), GradNormMonitor(), FractionalCheckpoint(), Progress()])
    trainer = runs.trainer(pl, **options)
    model = model or Model(at=9, happens=happens)
    trainer.fit(model, data or Data())
    return trainer


def unasked(callback: Any) -> Any:
    """As it comes with the environment."""
    callback.automatic, callback.asked_for = True, False
    return callback


@pytest.fixture
def fit(command: Launcher, tmp_path: Path) -> Callable[..., Done]:
    return lambda *words: command(*WORDS, *words, cwd=tmp_path)


def test_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path)
    report = told(tmp_path)
    assert (report.state, report.needs_help, report.step, report.seconds_left) == ("finished", False, 32, None)
    assert line(report, "state").startswith("finished: max_epochs=2 reached")
    assert line(report, "progress") == "step 32 of 32 (100%), 2 of 2 epochs"
    for name in ("loss", "gradient norm"):
        assert re.fullmatch(
            r"[\d.e-]+ \(step 32\); (rising|falling|steady) over the last [\d a-z]+", line(report, name)
        )
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
        ("slow", {"max_time": timedelta(seconds=0.1)}, "stopped", "stopped early: Timer: max_time reached"),
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
    with pytest.raises(NoRunError, match="no run has started there with a callback of this package"):
        find_run(tmp_path)
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


def test_a_run_that_writes_while_it_is_looked_at(fit: Callable[..., Done], tmp_path: Path) -> None:
    gates = [1, 9, 20]
    thread = threading.Thread(target=fit, args=(f"--model.gates={gates}",))
    thread.start()
    seen: list[int | None] = []
    while thread.is_alive():
        if list(tmp_path.rglob(FILE_NAME)):
            report = told(tmp_path)
            assert report.state in ("running", "finished")
            assert "running: process" in line(report, "state") or report.state == "finished"
            seen.append(report.step)
            if gates and report.step == gates[0]:
                (tmp_path / f"go-{gates.pop(0)}").touch()
        time.sleep(0.01)
    assert seen == sorted(seen)  # type: ignore[type-var]
    assert {1, 9, 20} <= set(seen)
    assert told(tmp_path).state == "finished"


def test_the_estimates_of_the_end_agree_with_the_moment_at_which_it_comes(tmp_path: Path) -> None:
    """At an even pace of two steps a second, with what each moment of a real run has written."""
    train(tmp_path / "run")
    written = [json.loads(text) for text in (find_run(tmp_path) / FILE_NAME).read_text().splitlines()]
    begun = time.time()
    for event in written:
        event["time"] = begun + event["step"] / 2
    (tmp_path / "seen").mkdir()
    estimates = []
    for event in written[:-1]:
        with (tmp_path / "seen" / FILE_NAME).open("a") as file:
            file.write(json.dumps(event) + "\n")
        if event["event"] == "progress":
            estimates.append((event["step"], told(tmp_path / "seen", now=event["time"] + 0.25).seconds_left))
    assert {step for step, _ in estimates} == set(range(1, 33))
    for step, left in estimates:
        assert left == pytest.approx(max(0.0, (32 - step) / 2 - 0.25)), step


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
        rf"far from unit scale at the start: the input of layer\.1, std {number}, by layer\.0 \(x100,000\)",
        line(report, "layers"),
    )
    assert line(report, "incidents") == "0"


def test_what_nobody_has_written_is_unknown(tmp_path: Path) -> None:
    EventLog(tmp_path).write("update_skipped", 3, 0, by="guard", why="the loss was nan")
    report = told(tmp_path)
    assert report.state == "unknown"
    for name in ("loss", "gradient norm", "precision"):
        assert line(report, name) == "unknown"
    start(tmp_path, total_steps=None, max_epochs=None)
    report = told(tmp_path)
    assert line(report, "estimated end") == "unknown: the run has no last step"
    assert line(report, "progress") == "step 0, epoch 0"


def progress(folder: Path, step: int, at: float, **changes: Any) -> None:
    """Write a progress event of a run of 4 epochs of 100 batches."""
    facts = {"batch_idx": step % 100, "batches": 100, "loss": 1.0, "grad_norm": 2.0, "loss_scale": None, "skipped": 0}
    event = {"event": "progress", "step": step, "epoch": step // 100, "time": at, "rank": 0, **facts, **changes}
    with (folder / FILE_NAME).open("a") as file:
        file.write(json.dumps(event) + "\n")


@pytest.mark.parametrize("counted", [{}, {"total_steps": None, "steps_per_epoch": None}], ids=["by steps", "by epochs"])
def test_the_end_is_estimated_from_the_speed_of_the_last_epoch(tmp_path: Path, counted: dict[str, Any]) -> None:
    start(tmp_path, **counted)
    now = next(read_events(tmp_path))["time"]
    for step in range(5, 105, 5):
        now += 50.0  # ten seconds a step, in the first epoch
        progress(tmp_path, step, now)
    for step in range(105, 255, 5):
        now += 5.0  # one second a step
        progress(tmp_path, step, now)
    report = told(tmp_path, now=now)
    assert report.seconds_left == pytest.approx(150.0, abs=2.0)
    assert "at 1 s a step" in line(report, "estimated end")
    assert told(tmp_path, now=now + 30.0).seconds_left == pytest.approx(report.seconds_left - 30.0)


def test_newest_numbers_have_a_trend_and_those_that_are_not_finite_are_shown(tmp_path: Path) -> None:
    start(tmp_path)
    for step in range(1, 13):
        progress(tmp_path, step, 1000.0 + 5 * step, loss=-1.0 / step, grad_norm=2.0**step, loss_scale=2.0**16 / step)
    report = told(tmp_path)
    assert line(report, "loss") == "-0.08333 (step 12); rising over the last 55 s"
    assert line(report, "gradient norm") == "4,096 (step 12); rising over the last 55 s"
    assert line(report, "loss scale") == "5,461"
    progress(tmp_path, 13, 1065.0, loss="nan", grad_norm=None, skipped=7)
    report = told(tmp_path)
    assert line(report, "loss").startswith("nan (step 13); rising")
    assert line(report, "gradient norm").startswith("4,096 (step 12)")
    assert line(report, "skipped updates") == "7"


def test_too_many_skips_are_shown(tmp_path: Path) -> None:
    start(tmp_path)
    EventLog(tmp_path).write("many_skips", 1200, 3, skipped=51, of=1000)
    report = told(tmp_path)
    assert line(report, "skipped updates") == "0, 51 of the last 1,000 at step 1,200: too many"
    assert "step 1,200  51 of the last 1000 updates were skipped" in str(report)


def test_broken_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    start(tmp_path)
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"event": {"event"\n[1]\n')
    progress(tmp_path, 7, time.time())
    report = told(tmp_path)
    assert (report.step, line(report, "unreadable lines")) == (7, "2")
    assert line(told(tmp_path / FILE_NAME), "unreadable lines") == "2"


def test_a_run_whose_file_was_begun_anew_is_one_run(tmp_path: Path) -> None:
    """The start of training is at the head of every new file."""
    log = EventLog(tmp_path, max_bytes=1200)
    start(tmp_path, total_steps=None)
    for step in range(60):
        log.write("update_skipped", step, 0, by="guard", why="the loss was nan")
    first = (tmp_path / PREVIOUS_FILE_NAME).read_text().splitlines()[0]
    assert '"repeated": true' in first
    report = told(tmp_path)
    assert (report.state, report.step) == ("running", 59)
    written = [event for event in read_events(tmp_path) if event["event"] == "update_skipped"]
    assert line(report, "incidents") == str(len(written))


@pytest.mark.parametrize("model", [Model, TwoOptimizers])
def test_a_real_fit_writes_its_progress(tmp_path: Path, model: Any) -> None:
    train(tmp_path, model=model(), callbacks=[NaNEarlyStop(patience=0)], max_epochs=2)
    events = [event for event in read_events(find_run(tmp_path)) if event["event"] == "progress"]
    names = ("event", "step", "epoch", "time", "rank", "batch_idx", "batches", "loss", "grad_norm", "loss_scale")
    for event in events:
        assert event.keys() == {*names, "learning_rate", "skipped", "seconds"}
        assert (event["rank"], event["batches"], event["skipped"], event["loss_scale"]) == (0, 16, 0, None)
        assert event["learning_rate"] > 0
        assert event["seconds"] >= 0
    ends = [event for event in events if event["batch_idx"] == 15]
    assert [event["epoch"] for event in ends][:2] == [0, 1], "one at each epoch's end"
    assert len(events) <= 4 + events[-1]["seconds"] / 5, "and at most one each five seconds"
    report = told(tmp_path)
    assert re.fullmatch(r"[\d.e-]+ \(step \d+\)", line(report, "gradient norm"))
    if model is Model:
        assert ends[1]["step"] == 32
        assert re.fullmatch(r"[\d.e-]+ \(step 32\)", line(report, "loss"))


def test_the_run_that_was_written_to_last_is_found_from_above(tmp_path: Path) -> None:
    for version, name in enumerate((FILE_NAME, FILE_NAME, "metrics.csv")):
        folder = tmp_path / "lightning_logs" / f"version_{version}"
        folder.mkdir(parents=True)
        (folder / name).write_text("")
        os.utime(folder / name, (1000 + version, 1000 + version))
    assert find_run(tmp_path).name == "version_1"
    os.utime(tmp_path / "lightning_logs" / "version_0" / FILE_NAME, (2000, 2000))
    assert find_run(tmp_path / "lightning_logs").name == "version_0"
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
        ([__file__], "is a file and no events.jsonl; expected the folder of a run"),
        (["."], "There is no events.jsonl in . or below it"),
    ):
        done = command("status", *words, cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
