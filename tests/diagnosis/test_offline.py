"""An incident folder is written in one process and diagnosed in a fresh one, from another folder."""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LightningCLI

import lightning_stability.diagnosis
from lightning_stability.diagnosis import DiagnosisError, write_incident
from tests.command import Launcher
from tests.diagnosis import augmented
from tests.zoo.program import Program
from tests.zoo.recording import record

FROM_THE_ZOO = [
    "masked_attention",
    "input_statistics",
    "bf16_saturation",
    "no_epsilon",
    "gan_saturation",
    "loaded_weights",
]


def write(program: Program, folder: Path) -> Any:
    """Train until it goes wrong, and write the incident."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = record(program)[0]
    assert step is not None
    assert write_incident(folder, step, history=[{"step": 0, "loss": 1.0}]) == {}
    return step


def diagnose(
    command: Launcher, folder: Path, elsewhere: Path, *words: str, whole: bool = False
) -> tuple[dict[str, Any], Any]:
    elsewhere.mkdir(exist_ok=True)
    typed = ["diagnose", str(folder), *words]
    program = f"import sys; from tests.diagnosis.brief import run; sys.exit(run({typed!r}))"
    done = command(*(typed if whole else ("-c", program)), cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "report.json").read_text()), done


@pytest.mark.parametrize(
    "precision", ["32-true", "16-mixed", *(pytest.param(p, marks=pytest.mark.slow) for p in ("bf16-mixed", "64-true"))]
)
def test_a_fresh_process_gets_the_same_loss_bits(precision, tmp_path, command):
    torch.manual_seed(0)
    step = write(augmented.program(0, precision), tmp_path / "incident")
    assert len(step.losses) == 3
    assert all(loss > 0 for loss in step.losses)
    report, done = diagnose(command, tmp_path / "incident", tmp_path / "elsewhere", whole=precision == "32-true")
    assert (report["reproduced"], report["exact"]) == (True, True), done.stdout
    assert report["origin"]["line"] == augmented.program(0).expected.line
    assert report["schema"] == 1


@pytest.mark.parametrize("name", FROM_THE_ZOO)
def test_the_origin_is_found_offline(name, tmp_path, command):
    torch.manual_seed(0)
    program = importlib.import_module(f"tests.zoo.{name}").program(0)
    write(program, tmp_path / "incident")
    report, done = diagnose(command, tmp_path / "incident", tmp_path / "elsewhere", whole=name == "no_epsilon")
    expected = program.expected
    origin = report["origin"]
    assert report["reproduced"] is True, done.stdout
    assert (origin["phase"], origin["module"], origin["line"]) == (expected.phase, expected.module, expected.line)
    assert len(done.stdout.splitlines()) <= 20


@pytest.mark.usefixtures("brief")
def test_a_bit_that_flipped_once_is_not_reproduced(tmp_path):
    torch.manual_seed(0)
    program = augmented.program(0, twin=False)

    class Flip(pl.Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
            if trainer.global_step == 1:
                loss.data.view(torch.int32).bitwise_or_(0x7F800000)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = record(program, [Flip()])[0]
    write_incident(tmp_path / "incident", step)
    report = lightning_stability.diagnosis.diagnose(tmp_path / "incident")
    assert (report["reproduced"], report["origin"]) == (False, None)
    assert any("sign of a transient fault or a race" in note for note in report["notes"])


@pytest.mark.usefixtures("brief")
def test_replays_that_differ_are_called_not_deterministic(tmp_path):
    torch.manual_seed(0)
    write(augmented.program(0), tmp_path / "incident")

    class Random(augmented.Augmented):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            entropy = int.from_bytes(os.urandom(2), "big")  # no generator's
            return super().training_step(batch, 0) + entropy * 0.001

    report = lightning_stability.diagnosis.diagnose(tmp_path / "incident", Random)
    assert report["reproduced"] is False
    assert any("differ among themselves" in note for note in report["notes"])


SCRIPT = """
import sys
import torch
from tests.zoo.program import Module, Program, loader
from tests.zoo.recording import record
from lightning_stability.diagnosis import write_incident


class Net(Module):
    def __init__(self, width):
        super().__init__()
        {save}
        self.linear = torch.nn.Linear(4, width)

    def training_step(self, batch, batch_idx):
        return torch.log(self.linear(batch) * 0).mean()


def factory():
    return Net(3)


if __name__ == "__main__":
    open("trained", "w").close()
    step, _ = record(Program(Net(3), loader(list(torch.randn(8, 4)))))
    write_incident(sys.argv[1], step)
"""


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("save", ["self.save_hyperparameters()", "pass"])
def test_a_class_of_a_script_is_loaded_from_its_file(save, tmp_path, command):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(save=save))
    run = f"import runpy, sys; sys.argv = ['', 'incident']; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = command("-c", run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "trained").unlink()
    if save == "pass":  # what it was made with is not known
        with pytest.raises(DiagnosisError, match=r"missing 1 required .*save_hyperparameters.*--module package"):
            lightning_stability.diagnosis.diagnose(tmp_path / "incident")
        report = lightning_stability.diagnosis.diagnose(tmp_path / "incident", "train:factory")
    else:
        report = lightning_stability.diagnosis.diagnose(tmp_path / "incident")
    assert report["reproduced"] is True
    assert (report["origin"]["op"], Path(report["origin"]["file"]).name) == ("log", "train.py")
    assert not (tmp_path / "trained").exists()
    sys.path[:] = [path for path in sys.path if path != str(tmp_path)]


def test_a_class_that_was_typed_into_a_console_is_said_to_be_in_no_file(tmp_path, command):
    typed = "import sys; sys.argv = ['', 'incident']\n" + SCRIPT.format(save="self.save_hyperparameters()")
    done = command("-c", typed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = command("diagnose", str(tmp_path / "incident"), cwd=tmp_path)
    assert done.returncode == 2
    told = "typed into a notebook or a console, so it is in no file. Give a function that makes it: --module"
    assert told in " ".join(done.stderr.split())


@pytest.mark.parametrize("budget", ["-1", "soon", "nan"])
def test_a_budget_that_is_none_is_refused_in_a_sentence(budget, tmp_path, command):
    done = command("diagnose", str(tmp_path), f"--budget={budget}", cwd=tmp_path)
    assert done.returncode == 2
    told = f"argument --budget: '{budget}': expected a number of seconds, 0 or more"
    assert told in " ".join(done.stderr.split())


def test_a_module_that_cannot_be_made_says_what_to_do(tmp_path, command):
    class Local(augmented.Augmented):
        pass

    torch.manual_seed(0)
    program = augmented.program(0)
    program.module = Local()
    write(program, tmp_path / "incident")
    done = command("diagnose", str(tmp_path / "incident"), cwd=tmp_path)
    assert done.returncode == 2
    assert "was made inside a function. Give a function that makes it: --module" in done.stderr
    assert "Traceback" not in done.stderr
    report, _ = diagnose(command, tmp_path / "incident", tmp_path, "--module", "tests.diagnosis.augmented:Augmented")
    assert (report["reproduced"], report["exact"]) == (True, True)


@pytest.mark.usefixtures("brief")
def test_a_module_that_a_command_line_made_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fit"])
    cli = LightningCLI(
        augmented.Augmented, run=False, save_config_callback=None, args=["--model.width=12", "--trainer.logger=false"]
    )
    program = augmented.program(0)
    program.module = cli.model
    write(program, tmp_path / "incident")
    assert lightning_stability.diagnosis.diagnose(tmp_path / "incident")["exact"] is True


class BuiltLater(augmented.Augmented):
    """Makes a layer in `configure_model` and another in `setup`."""

    def __init__(self):
        super().__init__()
        self.head, self.extra = None, None

    def configure_model(self):
        self.head = self.head or torch.nn.Linear(16, 2)

    def setup(self, stage):
        self.extra = self.extra or torch.nn.Linear(1, 1)


@pytest.mark.usefixtures("brief")
def test_layers_that_are_made_after_the_constructor_are_made_anew(tmp_path):
    torch.manual_seed(0)
    program = augmented.program(0)
    program.module = BuiltLater()
    write(program, tmp_path / "incident")
    report = lightning_stability.diagnosis.diagnose(tmp_path / "incident")
    assert (report["reproduced"], report["exact"]) == (True, True)


def test_weights_of_another_module_are_refused(tmp_path):
    torch.manual_seed(0)
    write(augmented.program(0), tmp_path / "incident")
    with pytest.raises(DiagnosisError, match=r"parameter net.0.weight has another shape: \[16, 6\] recorded, \[8, 6\]"):
        lightning_stability.diagnosis.diagnose(tmp_path / "incident", lambda: augmented.Augmented(width=8))


def test_a_folder_of_incidents_is_told_from_an_incident(tmp_path):
    write(augmented.program(0), tmp_path / "1-step1")
    with pytest.raises(DiagnosisError, match=r"is no incident folder.*1-step1"):
        lightning_stability.diagnosis.diagnose(tmp_path)
