"""Every logger gets the norms and the notices in its own form, and none that fails takes the run with it."""

import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_stability import GradNormMonitor
from lightning_stability.callbacks.loggers import notify_loggers
from tests import runs

NOTICE = ("Training stopped", "loss is NaN at step 3", "lightning_stability/stopped", 3)


def fit(pl: Any, loggers: list[Any], automatic: bool) -> tuple[Any, list[str]]:
    monitor = GradNormMonitor()
    monitor.asked_for = not automatic
    trainer = runs.trainer(pl, logger=loggers, callbacks=[monitor])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(runs.make_module(pl), runs.data())
    return trainer, [str(w.message) for w in caught if "lightning-stability" in str(w.message)]


def raising_logger(pl: Any) -> Any:
    """A logger whose server is gone, with the steps of the calls that it got."""

    class Unreachable(pl.loggers.Logger):
        name = "unreachable"
        version = "0"

        def __init__(self) -> None:
            super().__init__()
            self.calls: list[Any] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.calls.append(step)
            raise ConnectionError("the server is gone")

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

    return Unreachable()


class FullDisk(SummaryWriter):
    """TensorBoard's writer on a disk that takes no more texts."""

    texts = 0

    def add_text(self, *args: Any, **kwargs: Any) -> None:
        self.texts += 1
        raise OSError("disk full")


class LooksLikeALogger:
    """All that a Trainer asks of a logger, but it is none of Lightning's: other projects test with such doubles."""

    name, version = "double", "0"

    def __init__(self, folder: Path) -> None:
        self.save_dir = self.log_dir = self.root_dir = str(folder)
        self.experiment = None
        self.rows: list[Any] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, metrics))

    def ignore(self, *args: Any, **kwargs: Any) -> None:
        pass

    log_hyperparams = log_graph = save = finalize = after_save_checkpoint = ignore


@pytest.mark.parametrize("automatic", [True, False])
def test_every_logger_but_the_automatic_ones_csv_gets_the_norms(pl: Any, tmp_path: Path, automatic: bool) -> None:
    class OwnTable(pl.loggers.CSVLogger):
        pass

    memory, board = runs.memory_logger(pl), pl.loggers.TensorBoardLogger(tmp_path)
    tables = [pl.loggers.CSVLogger(tmp_path / "a"), OwnTable(tmp_path / "b")]
    fit(pl, [*tables, memory, board], automatic)
    assert [step for step, row in memory.rows if "grad_norm/total" in row] == [0, 1, 2, 3]
    events = EventAccumulator(board.log_dir)
    events.Reload()
    assert len(events.Scalars("grad_norm/total")) == 4
    files = [Path(table.log_dir) / "metrics.csv" for table in tables]
    assert ["grad_norm/total" in file.read_text() if file.exists() else False for file in files] == [not automatic] * 2


def test_what_only_looks_like_a_logger_is_not_called(one: Any, tmp_path: Path) -> None:
    """As tests of other projects have it: they count the calls."""
    double, memory = LooksLikeALogger(tmp_path), runs.memory_logger(one)
    fit(one, [double, memory], automatic=True)
    assert len(memory.rows) == 4
    assert double.rows == []


@pytest.mark.parametrize("automatic", [True, False])
def test_a_logger_that_raises_is_called_once_and_warned_of_once(pl: Any, automatic: bool) -> None:
    memory, unreachable = runs.memory_logger(pl), raising_logger(pl)
    trainer, messages = fit(pl, [unreachable, memory], automatic)
    assert trainer.global_step == len(memory.rows) == 4
    assert unreachable.calls == [0]
    [message] = messages
    assert "raised ConnectionError: the server is gone" in message


@pytest.mark.parametrize("name", ["log_dir", "name", "version"])
def test_a_logger_that_cannot_say_its_folder_fails_no_run(pl: Any, tmp_path: Path, name: str) -> None:
    """The events go to the folder of the next logger."""

    def gone(self: Any) -> Any:
        raise ConnectionError("the server is gone")

    class Unreachable(type(runs.memory_logger(pl))):  # type: ignore[misc]
        save_dir = str(tmp_path / "unreachable")

    setattr(Unreachable, name, property(gone))
    table = pl.loggers.CSVLogger(tmp_path)
    trainer, _ = fit(pl, [Unreachable(), table], automatic=False)
    assert trainer.global_step == 4
    assert (Path(table.log_dir) / "events.jsonl").exists()


def test_a_notice_is_a_text_in_tensorboard(pl: Any, tmp_path: Path) -> None:
    board = pl.loggers.TensorBoardLogger(tmp_path, prefix="run")
    trainer, _ = fit(pl, [board, runs.memory_logger(pl)], automatic=True)
    notify_loggers(trainer, *NOTICE)
    board.experiment.flush()
    events = EventAccumulator(board.log_dir)
    events.Reload()
    [text] = events.Tensors("run-lightning_stability/stopped/text_summary")
    assert text.step == 3
    assert text.tensor_proto.string_val == [b"Training stopped: loss is NaN at step 3"]


@pytest.mark.parametrize("filter_", ["always", "error"])
def test_a_notice_never_raises(pl: Any, tmp_path: Path, filter_: str) -> None:
    writer = FullDisk(str(tmp_path))

    class Board(pl.loggers.TensorBoardLogger):
        experiment = writer

    trainer, _ = fit(pl, [Board(tmp_path)], automatic=True)
    with warnings.catch_warnings():
        warnings.simplefilter(filter_)
        for _ in range(3):
            notify_loggers(trainer, *NOTICE)
    assert writer.texts == 1


@pytest.mark.slow
def test_the_real_wandb_offline(pl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = pl.loggers.WandbLogger(save_dir=tmp_path, offline=True, project="norms")
    trainer, messages = fit(pl, [logger], automatic=True)
    notify_loggers(trainer, *NOTICE)
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert messages == []
    assert summary["grad_norm/total"] > 0
    assert summary["trainer/global_step"] == 3
    assert summary["lightning_stability/stopped"] == "step 3: loss is NaN at step 3"
    [written] = tmp_path.rglob("*.wandb")
    for _ in range(100):  # another process writes it
        if b"Training stopped" in written.read_bytes():
            return
        time.sleep(0.1)
    pytest.fail("the alert is not in the run's file")


@pytest.mark.slow
def test_the_real_mlflow_with_a_local_file_store(pl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = pl.loggers.MLFlowLogger(tracking_uri=f"file:{tmp_path}", experiment_name="norms")
    trainer, messages = fit(pl, [logger], automatic=True)
    notify_loggers(trainer, NOTICE[0], "x" * 10_000, *NOTICE[2:])
    assert messages == []
    history = logger.experiment.get_metric_history(logger.run_id, "grad_norm/total")
    assert [metric.step for metric in history] == [0, 1, 2, 3]
    tags = logger.experiment.get_run(logger.run_id).data.tags
    assert tags["lightning_stability/stopped"].startswith("step 3: xxx")
