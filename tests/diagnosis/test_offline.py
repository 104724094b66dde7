"""An incident folder is written in one process and diagnosed in a fresh one, from another folder."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_stability.diagnosis import write_incident
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


def diagnose(command: Launcher, folder: Path, elsewhere: Path, *words: str) -> tuple[dict[str, Any], Any]:
    elsewhere.mkdir(exist_ok=True)
    done = command("diagnose", str(folder), *words, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "report.json").read_text()), done


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "64-true"])
def test_a_fresh_process_gets_the_same_loss_bits(precision, tmp_path, command):
    torch.manual_seed(0)
    step = write(augmented.program(0, precision), tmp_path / "incident")
    assert len(step.losses) == 3
    assert all(loss > 0 for loss in step.losses)
    report, done = diagnose(command, tmp_path / "incident", tmp_path / "elsewhere")
    assert (report["reproduced"], report["exact"]) == (True, True), done.stdout
    assert report["origin"]["line"] == augmented.program(0).expected.line
    assert report["schema"] == 1


@pytest.mark.parametrize("name", FROM_THE_ZOO)
def test_the_origin_is_found_offline(name, tmp_path, command):
    torch.manual_seed(0)
    program = importlib.import_module(f"tests.zoo.{name}").program(0)
    write(program, tmp_path / "incident")
    report, done = diagnose(command, tmp_path / "incident", tmp_path / "elsewhere")
    expected = program.expected
    origin = report["origin"]
    assert report["reproduced"] is True, done.stdout
    assert (origin["phase"], origin["module"], origin["line"]) == (expected.phase, expected.module, expected.line)
    assert len(done.stdout.splitlines()) <= 20
