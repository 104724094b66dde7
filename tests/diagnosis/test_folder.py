"""The incident folder: written whole or not at all, and what is not as it was written gives one clear error."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_stability.checkpointing import writing
from lightning_stability.diagnosis import DiagnosisError, diagnose, read_incident, write_incident
from lightning_stability.diagnosis.fields import digest
from tests.command import run_python
from tests.diagnosis import large
from tests.zoo import loaded_weights, log_of_zero, past_the_end
from tests.zoo.recording import record

Pair = collections.namedtuple("Pair", "left right")


@dataclasses.dataclass
class Sample:
    signal: torch.Tensor
    length: int


class Opaque:
    pass


@pytest.fixture(scope="module")
def step() -> Any:
    torch.manual_seed(0)
    return record(log_of_zero.program(0))[0]


@pytest.fixture
def folder(step: Any, tmp_path: Path) -> Path:
    assert write_incident(tmp_path / "1-step0", step, history=[{"step": 0}], details={"why": "a test"}) == {}
    return tmp_path / "1-step0"


def rewrite(folder: Path, **changes: Any) -> None:
    """Change incident.json as somebody would who also mends its checksum."""
    path = folder / "incident.json"
    about = json.loads(path.read_text()) | changes
    del about["digest"]
    path.write_text(json.dumps(about | {"digest": digest(about)}))


def test_a_folder_holds_what_was_recorded(folder, step):
    incident = read_incident(folder)
    assert torch.equal(incident.batches[0][0], step.batches[0][0])
    assert incident.state["parameters"].keys() == dict(step.module.named_parameters()).keys()
    assert incident.history == [{"step": 0}]
    assert incident.about["details"] == {"why": "a test"}
    for name in ("batches.pt", "state.pt", "random.pt"):
        torch.load(folder / name, weights_only=True)


@pytest.mark.parametrize("name", ["incident.json", "batches.pt", "state.pt", "random.pt", "history.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_file_gives_one_error_that_names_it(name, damage, folder):
    path = folder / name
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(DiagnosisError, match=name):
        read_incident(folder)


def test_a_foreign_folder_is_refused(tmp_path):
    with pytest.raises(DiagnosisError, match="is no incident folder"):
        diagnose(tmp_path)
    (tmp_path / "incident.json").write_text('{"what": "a fire"}')
    with pytest.raises(DiagnosisError, match="not an incident of lightning-stability"):
        diagnose(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("losses", ["one"]), ("loss_divisor", 0), ("batch_indices", [0, 1]), ("module", {"class": "x"}), ("failed", None)],
)
def test_a_field_of_another_kind_is_refused(field, value, folder):
    rewrite(folder, **{field: value})
    with pytest.raises(DiagnosisError):
        read_incident(folder)


def test_no_code_of_the_folder_is_executed(folder):
    (folder / "evil.py").write_text("open('executed', 'w')")
    about = json.loads((folder / "incident.json").read_text())
    module = about["module"] | {"class": "__main__:Net", "file": str(folder / "evil.py")}
    rewrite(folder, module=module)
    with pytest.raises(DiagnosisError, match="code in its own folder"):
        diagnose(folder)
    assert not Path("executed").exists()


def test_a_pickle_that_executes_code_is_refused(folder):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch executed",)

    torch.save([Evil()], folder / "batches.pt")
    content = (folder / "batches.pt").read_bytes()
    files = json.loads((folder / "incident.json").read_text())["files"]
    files["batches.pt"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite(folder, files=files)
    with pytest.raises(DiagnosisError, match=r"batches\.pt cannot be loaded"):
        read_incident(folder)
    assert not Path("executed").exists()


def test_batches_of_every_common_kind_come_back(step, tmp_path):
    batch = {"x": torch.ones(1), "n": np.ones(2), "pair": Pair(1, "b"), "s": Sample(torch.ones(1), 3), "t": (1, None)}
    odd = dataclasses.replace(step, batches=[batch])
    assert write_incident(tmp_path / "i", odd) == {}
    [back] = read_incident(tmp_path / "i").batches
    assert isinstance(back["n"], np.ndarray)
    assert (back["pair"], back["s"].length, back["t"]) == (Pair(1, "b"), 3, (1, None))


def test_batches_that_cannot_be_kept_are_named(step, tmp_path):
    odd = dataclasses.replace(step, batches=[{"x": torch.ones(1), "graph": Opaque()}])
    left_out = write_incident(tmp_path / "i", odd)
    assert left_out == {"batches": "batches[0]['graph'] is a tests.diagnosis.test_folder.Opaque"}
    with pytest.raises(DiagnosisError, match=r"batches .* were not kept: .*graph"):
        diagnose(tmp_path / "i")


@pytest.mark.usefixtures("brief")
def test_without_state_the_report_says_whose_weights_were_used(step, tmp_path):
    torch.manual_seed(0)
    left_out = write_incident(tmp_path / "i", step, save_state=False)
    assert list(left_out) == ["state"]
    report = diagnose(tmp_path / "i")
    assert any("weights are those that the module is made with" in note for note in report["notes"])


@pytest.mark.usefixtures("brief")
def test_a_finite_replay_with_other_weights_is_no_transient_fault(tmp_path):
    torch.manual_seed(0)
    step = record(loaded_weights.program(0))[0]  # the NaN is in the weights, which are not kept
    write_incident(tmp_path / "i", step, save_state=False)
    report = diagnose(tmp_path / "i")
    assert report["reproduced"] is False
    assert report["causes"][0]["cause"] == "unknown"


@pytest.mark.usefixtures("brief")
def test_an_option_that_numpy_computed_is_kept(tmp_path):
    torch.manual_seed(0)
    step = record(past_the_end.program(0))[0]
    assert type(step.optimizers[0].param_groups[0]["lr"]) is np.float64
    assert write_incident(tmp_path / "i", step) == {}
    [first, *_] = diagnose(tmp_path / "i")["causes"]
    assert (first["cause"], first["facts"]["option"]) == ("optimizer_update", "lr")


def test_a_read_only_folder_is_an_error_of_the_system(step, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        write_incident(tmp_path / "file" / "i", step)


def test_nothing_is_written_over(folder, step):
    with pytest.raises(OSError):
        write_incident(folder, step)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    read_incident(folder)


def test_a_report_that_cannot_be_written_is_given_all_the_same(folder):
    (folder / "report.json").mkdir()
    (folder / "report.json" / "x").write_text("")
    report = diagnose(folder)
    assert report["origin"]["op"] == "log"
    assert any("could not be written" in note for note in report["notes"])


def test_a_killed_writer_leaves_no_folder_that_looks_whole(step, tmp_path):
    large = dataclasses.replace(step, batches=[torch.zeros(1000, 1000)])
    child = os.fork()
    if child == 0:
        for number in range(100_000):
            write_incident(tmp_path / str(number), large)
    deadline = time.monotonic() + 300
    while not (tmp_path / "3").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    written = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert len(written) >= 4
    for path in written:
        read_incident(path)
    writing.remove_parts(str(tmp_path))
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_a_full_disk_has_no_room_for_is_named(step, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    left_out = write_incident(tmp_path / "i", step)
    assert "are needed and 1.0 MB free" in left_out["state"]
    assert read_incident(tmp_path / "i").state is None


def test_a_write_that_fails_half_way_is_named_and_leaves_no_file(step, tmp_path):
    large = dataclasses.replace(step, batches=[torch.zeros(1000, 1000)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
        left_out = write_incident(tmp_path / "i", large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert list(left_out) == ["batches"]
    assert read_incident(tmp_path / "i").batches is None
    assert not (tmp_path / "i" / "batches.pt").exists()


@pytest.mark.slow
def test_a_replay_without_enough_memory_is_one_sentence_and_loses_nothing(tmp_path):
    done = run_python(large.__file__, str(tmp_path), cwd=Path(large.__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert "steps: 4" in done.stdout  # the run has gone on
    [folder] = (tmp_path / "incidents").iterdir()
    report = json.loads((folder / "report.json").read_text())
    assert (report["reproduced"], report["notes"]) == (None, ["there was not enough memory to run the step again"])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) >= {"batches.pt", "state.pt"}
    done = run_python(large.__file__, "diagnose", str(folder), cwd=Path(large.__file__).parents[2])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"lightning-stability: error: there was not enough memory to run the step of {folder} again, which is as it was"
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
