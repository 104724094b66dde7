"""What IncidentReport writes of real runs that go wrong, and that such a run continues as it would without."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_stability import IncidentReport, InputCheck, NaNEarlyStop, PrecisionFallback
from lightning_stability._compat import MisconfigurationException
from lightning_stability.diagnosis import capture_state, diagnose, read_incident
from lightning_stability.runtime import watch
from lightning_stability.status.report import look
from lightning_stability.status.run import Run
from tests import runs
from tests.diagnosis import augmented
from tests.recovery import poison

RESULTS = ("weights", "optimizers", "average", "metrics", "rates", "step", "random", "precision")


def adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-2)


def fused(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


def train(pl: Any, kinds: dict[int, str], callbacks: list[Any], optimizer: Any = adamw, **options: Any) -> Any:
    return poison.fit(pl, poison.make_module(pl, kinds, optimizer, by_hand=False), callbacks, **options)


def folders(path: Path) -> list[Path]:
    return sorted((path / "incidents").iterdir()) if (path / "incidents").is_dir() else []


def augmented_run(pl: Any, callbacks: list[Any], seed: int = 0, **options: Any) -> Any:
    """Dropout, numpy's augmentation, three accumulated batches; the gradient of the second step is not finite."""
    torch.manual_seed(seed)
    program = augmented.program(seed)
    trainer = runs.trainer(pl, callbacks=callbacks, **{**program.options, **options})
    trainer.fit(program.module, program.data)
    return program, trainer


class Watcher:
    """Keeps the state from before each window, and what every batch held."""

    def __new__(cls, pl: Any) -> Any:
        class Watching(pl.Callback):
            def __init__(self) -> None:
                self.states: dict[int, Any] = {}

            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                if batch_idx % trainer.accumulate_grad_batches == 0:
                    self.states[trainer.global_step] = capture_state(pl_module, trainer.optimizers)

        return Watching()


@pytest.mark.usefixtures("brief")
def test_an_incident_says_where_the_step_went_wrong_and_reproduces(one, tmp_path):
    with pytest.warns(UserWarning, match="was recorded in .*1-step1. The first non-finite value was made in"):
        program, _ = augmented_run(one, [IncidentReport(tmp_path)])
    [folder] = folders(tmp_path)
    assert folder.name == "1-step1"
    report = json.loads((folder / "report.json").read_text())
    assert (report["origin"]["phase"], report["origin"]["op"]) == ("backward", "sqrt")
    assert report["origin"]["line"] == program.expected.line
    assert "sqrt" in (folder / "report.txt").read_text()
    again = diagnose(folder)
    assert (again["reproduced"], again["exact"]) == (True, True)
    assert again["origin"] == report["origin"]


@pytest.mark.usefixtures("brief")
def test_the_incident_holds_the_steps_before_and_the_samples(one, tmp_path):
    augmented_run(one, [IncidentReport(tmp_path, budget_seconds=0)])
    incident = read_incident(folders(tmp_path)[0])
    [row] = incident.history
    assert (row["step"], row["outcome"]) == (0, "applied")
    assert row["grad_norms"].keys() == {"net.0", "net.1", "head"}
    size = len(incident.batches[0][0])
    assert incident.about["details"]["dataset_indices"] == [
        list(range(i * size, (i + 1) * size)) for i in incident.about["batch_indices"]
    ]
    report = json.loads((incident.folder / "report.json").read_text())
    assert (report["reproduced"], report["notes"]) == (None, ["it was not run again in the run"])


def some_slow(fast: list[tuple[Any, ...]], everything: Any) -> list[Any]:
    return [pytest.param(*case, marks=[] if case in fast else pytest.mark.slow) for case in everything]


STATES = list(itertools.product(["nan_input", "inf_loss", "nan_gradient"], [(1, 3), (2, 2), (2, 3)], [0, 1]))
FAST_STATES = [
    ("nan_gradient", (1, 3), 0),
    ("nan_gradient", (2, 3), 0),
    ("inf_loss", (2, 2), 0),
    ("nan_input", (2, 2), 1),
]


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize(("kind", "place", "lag"), some_slow(FAST_STATES, STATES))
def test_the_state_is_that_from_before_the_window(one, tmp_path, monkeypatch, kind, place, lag):
    accumulate, batch = place
    monkeypatch.setattr(watch, "read_lag", lambda trainer, retries: lag)  # as on a GPU
    watcher = Watcher(one)
    callbacks = [watcher, IncidentReport(tmp_path, budget_seconds=0), NaNEarlyStop(patience=2)]
    train(one, {batch: kind}, callbacks, fused, accumulate_grad_batches=accumulate)
    [folder] = folders(tmp_path)
    incident = read_incident(folder)
    expected = watcher.states[int(folder.name.removeprefix("1-step"))]
    assert incident.state.keys() - expected.keys() == {"schedulers"}
    assert poison.differences({name: incident.state[name] for name in expected}, expected) == []
    assert incident.about["notes"] == []


CASES = {
    "fp32": {},
    "fp16": {"init_scale": 256.0},
    "accumulation": {"accumulate_grad_batches": 2},
    "fp16, accumulation": {"init_scale": 256.0, "accumulate_grad_batches": 2},
}
KINDS = {3: "nan_input", 5: "nan_gradient", 8: "large_input", 9: "inf_loss"}


RUNS = [(case, fallback, lag) for case in CASES for fallback in (False, True)[: 1 + ("fp16" in case)] for lag in (0, 1)]
FAST_RUNS = [("fp32", False, 0), ("fp16", True, 0), ("accumulation", False, 0), ("fp16, accumulation", True, 1)]


@pytest.mark.parametrize(("case", "with_fallback", "lag"), some_slow(FAST_RUNS, RUNS))
def test_a_run_that_continues_is_bit_equal_to_one_without(
    one, tmp_path, monkeypatch, request, case, with_fallback, lag
):
    if (case, with_fallback, lag) != ("fp32", False, 0):
        request.getfixturevalue("brief")
    monkeypatch.setattr(watch, "read_lag", lambda trainer, retries: lag)
    results = []
    for report in ([IncidentReport(tmp_path, max_incidents=3)], []):
        options = dict(CASES[case])
        scale = options.pop("init_scale", None)
        options |= {} if scale is None else {"plugins": runs.fp16(one, init_scale=scale)}
        callbacks = [*report, NaNEarlyStop(patience=2), *([PrecisionFallback()] if with_fallback else [])]
        results.append(train(one, KINDS, callbacks, fused if lag else adamw, **options))
    assert len(folders(tmp_path)) == (2 if case == "fp16, accumulation" else 3)
    # (where a step waits for the answer to the one before, what reads the module between its batches reads it earlier)
    names = [name for name in RESULTS if name != "average" or not lag]
    assert poison.differences(*[{name: result[name] for name in names} for result in results]) == []


@pytest.mark.usefixtures("brief")
def test_a_step_that_fp32_has_cured_is_recorded_as_it_failed(one, tmp_path):
    callbacks = [PrecisionFallback(), IncidentReport(tmp_path), NaNEarlyStop(patience=0)]
    result = train(one, {2: "large_input"}, callbacks, plugins=runs.fp16(one, init_scale=256.0))
    assert result["trainer"].precision_plugin.precision == "32-true"
    [folder] = folders(tmp_path)
    incident = read_incident(folder)
    assert (incident.about["precision"], incident.about["failed"]) == ("16-mixed", "loss")
    assert incident.state["scaler"]["scale"] == 256.0
    report = json.loads((folder / "report.json").read_text())
    assert (report["origin"]["op"], report["origin"]["dtype"]) == ("to", "float16")


@pytest.mark.usefixtures("brief")
def test_of_the_batches_that_input_check_rejects_the_first_is_recorded(one, tmp_path):
    loader = poison.data()
    loader.dataset.tensors[0][8:16] *= 1e6
    callbacks = [InputCheck(max_abs=1e3, action="skip"), IncidentReport(tmp_path)]
    train(one, {}, callbacks, loader=loader)
    [folder] = folders(tmp_path)
    report = json.loads((folder / "report.json").read_text())
    assert (report["failed"], report["reproduced"], report["origin"]) == ("rejected", False, None)
    assert "InputCheck rejected a batch of the step" in (folder / "report.txt").read_text()
    about = read_incident(folder).about["details"]
    assert (about["outcome"], about["dataset_indices"]) == ("rejected", [[8, 9, 10, 11]])
    assert diagnose(folder, module=lambda: poison.make_module(one, {}, adamw, by_hand=False))["notes"] == []


@pytest.mark.usefixtures("brief")
def test_alone_it_skips_the_update_and_never_ends_the_run(one, tmp_path):
    result = train(one, dict.fromkeys(range(2, 12), "nan_input"), [IncidentReport(tmp_path)])
    assert result["step"] == 12
    assert poison.nonfinite(result["weights"]) == []
    assert [folder.name for folder in folders(tmp_path)] == ["1-step2", "2-step3"]


def test_the_event_and_the_status_name_the_folder(one, tmp_path):
    logger = one.loggers.CSVLogger(tmp_path)
    train(one, {2: "nan_gradient"}, [IncidentReport()], logger=logger)
    log = Path(logger.log_dir)
    [event] = [event for event in runs.incidents(log) if event["event"] == "incident_recorded"]
    assert event["path"] == str(log / "incidents" / "1-step2")
    assert event["origin"].startswith("the first non-finite value was made in the derivative of `sqrt`")
    assert (event["what"], event["reproduced"], event["left_out"]) == ("gradient", True, {})
    said = str(look(Run(log)))
    assert event["cause"].startswith("undefined_gradient: `sqrt` at ")
    assert f"1; the newest, of step 2, in {event['path']}: {event['cause']}" in said


@pytest.mark.usefixtures("brief")
def test_tensorboard_gets_the_cause_as_text(one, tmp_path):
    logger = one.loggers.TensorBoardLogger(tmp_path)
    train(one, {2: "nan_gradient"}, [IncidentReport()], logger=logger)
    logger.experiment.flush()
    board = EventAccumulator(logger.log_dir).Reload()
    key = "lightning_stability/incident/text_summary"
    [text] = [event.tensor_proto.string_val[0].decode() for event in board.Tensors(key)]
    assert text.startswith("Incident at step 2: undefined_gradient: `sqrt` at ")


@pytest.mark.usefixtures("brief")
def test_an_incident_of_another_run_is_not_replaced(one, tmp_path):
    for _ in range(2):
        train(one, {2: "nan_input"}, [IncidentReport(tmp_path, budget_seconds=0)])
    assert [folder.name for folder in folders(tmp_path)] == ["1-step2", "2-step2"]
    for folder in folders(tmp_path):
        read_incident(folder)


@pytest.mark.usefixtures("brief")
def test_a_resumed_run_counts_the_incidents_of_the_first(one, tmp_path):
    def fit(max_epochs: int, ckpt_path: Any) -> None:
        module = poison.make_module(one, {2: "nan_input", 8: "nan_input", 9: "nan_input"}, adamw, by_hand=False)
        callbacks = [IncidentReport(tmp_path, budget_seconds=0)]
        trainer = runs.trainer(one, callbacks=callbacks, max_epochs=max_epochs)
        trainer.fit(module, poison.data(), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "last.ckpt")

    fit(1, None)
    fit(2, tmp_path / "last.ckpt")
    assert [folder.name for folder in folders(tmp_path)] == ["1-step2", "2-step8"]


@pytest.mark.usefixtures("brief")
def test_a_batch_that_training_step_changes_is_named_in_the_notes(one, tmp_path):
    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = self.net(batch[0].clone()).pow(2).mean()
        batch[0].mul_(2.0)
        return loss * (torch.nan if batch_idx == 1 else 1.0)

    module = runs.make_module(one, training_step=training_step)
    runs.trainer(one, callbacks=[IncidentReport(tmp_path)]).fit(module, runs.data())
    incident = read_incident(folders(tmp_path)[0])
    assert incident.about["notes"] == ["`training_step` changes its batch in place: the replay is not exact"]
    assert "changes its batch in place" in (incident.folder / "report.txt").read_text()


# What fails in it does not end the run.


def same_as_without(one: Any, callback: IncidentReport) -> None:
    results = [
        train(one, {2: "nan_input", 7: "nan_gradient"}, c) for c in ([callback, NaNEarlyStop()], [NaNEarlyStop()])
    ]
    assert poison.differences(*[{name: result[name] for name in RESULTS} for result in results]) == []


def test_a_disk_that_is_nearly_full_keeps_what_it_has_room_for(one, small_disk):
    with pytest.warns(UserWarning, match="batches was not kept: .* MB are needed and .* MB free on the disk"):
        same_as_without(one, IncidentReport(small_disk))
    incident = read_incident(folders(small_disk)[0])
    assert incident.left_out.keys() == {"batches", "state"}
    assert (incident.folder / "report.json").is_file()


def test_a_full_disk_is_warned_of(one, small_disk):
    (small_disk / "filler").write_bytes(bytes(250_000))
    with pytest.warns(UserWarning, match="was not recorded"):
        same_as_without(one, IncidentReport(small_disk))
    assert folders(small_disk) == []


def test_a_read_only_folder_is_warned_of(one, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.warns(UserWarning, match=r"was not recorded: OSError: .*Read-only file system"):
        same_as_without(one, IncidentReport(small_disk))


@pytest.mark.usefixtures("brief")
def test_what_a_killed_run_left_half_written_is_removed(one, tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    host = socket.gethostname()
    half = tmp_path / "incidents" / f".1-step0.{host}-{gone.pid}.part"
    half.mkdir(parents=True)
    train(one, {2: "nan_input"}, [IncidentReport(tmp_path, budget_seconds=0)])
    assert [folder.name for folder in folders(tmp_path)] == ["1-step2"]


@pytest.mark.usefixtures("brief")
def test_a_batch_that_cannot_be_saved_is_named(one, tmp_path):
    class Opaque:
        def to(self, *args: Any, **kwargs: Any) -> Any:
            return self

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0][0]).pow(2).mean() * (torch.nan if batch_idx == 1 else 1.0)

    module = runs.make_module(one, training_step=training_step)
    loader = DataLoader(runs.data().dataset, batch_size=2, collate_fn=lambda rows: (rows[0], Opaque()))
    with pytest.warns(UserWarning, match=r"batches was not kept: batches\[0\]\[1\] is a .*Opaque"):
        runs.trainer(one, callbacks=[IncidentReport(tmp_path)]).fit(module, loader)
    assert json.loads((folders(tmp_path)[0] / "report.json").read_text())["reproduced"] is True


def test_a_run_without_a_folder_is_warned_of(one):
    with pytest.warns(UserWarning, match="IncidentReport writes nothing"):
        train(one, {2: "nan_input"}, [IncidentReport()])


@pytest.mark.parametrize("options", [{"max_incidents": 0}, {"budget_seconds": -1.0}])
def test_a_number_out_of_its_range_is_refused(options):
    with pytest.raises(MisconfigurationException, match="expected"):
        IncidentReport(**options)


# The message of a stop.


def test_a_stop_says_where_it_came_from(one):
    with pytest.warns(UserWarning, match="NaNEarlyStop ended the run") as caught:
        program, _ = augmented_run(one, [NaNEarlyStop(patience=0)])
    [said] = [str(w.message) for w in caught if "ended the run" in str(w.message)]
    assert "  origin: The first non-finite value was made in the derivative of `sqrt`, " in said
    assert f"augmented.py:{program.expected.line}, samples 0, 1" in said


def test_a_stop_says_why_the_origin_was_not_looked_for(one):
    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]).pow(2).mean() * (torch.nan if len(self.trainer.val_dataloaders or []) == 0 else 1.0)

    module = runs.make_module(one, training_step=training_step)
    with pytest.warns(UserWarning, match="origin: Where it came from was not found: .*trainer.val_dataloaders"):
        runs.trainer(one, callbacks=[NaNEarlyStop(patience=0)]).fit(module, runs.data())
