"""Each program in examples/ runs as it is, and what it prints is what its docstring promises."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.command import ROOT, Launcher

EXAMPLES = ROOT / "examples"
IMAGE = r"64 values that are not finite; sample \d+ \(dataset index 137\)"
PROMISED = {
    "image_classifier": [IMAGE, r"NaNEarlyStop: 115 updates, 5 skipped", r"Accuracy after 120 steps: 9\d\.\d%$"],
    "language_model_spike": [r"the loss was 8\.\d+ \(usual 2\.\d+, limit", "6 steps skipped, 0 rewinds"],
    "gan_manual": ["the loss was inf", "449 updates, 1 skipped", "All weights are finite: True$"],
    "fp16_fallback": [
        "The batch has been trained in 32-true, and so will be the rest",
        "120 updates, 0 skipped",
        r"Ended in 32-true, accuracy 9\d\.\d%$",
    ],
    "kill_and_resume": [
        "ended by signal 9",
        r"Resuming from epoch=001\.50-step=000036\.ckpt",
        "resumed exactly: 4 of 4 steps bitwise identical",
        "The weights of a run that was never killed: True$",
    ],
    "two_processes": [IMAGE, r"rank [01]\)\. More than", "Ranks: 2, equal weights: True, finite: True$"],
}


def outcome(command: Launcher, name: str, folder: Path) -> str:
    """What the program prints."""
    done = command(str(EXAMPLES / f"{name}.py"), cwd=folder)
    assert done.returncode == 0, done.stderr
    said = done.stderr + done.stdout.strip()
    for promise in PROMISED[name]:
        assert re.search(promise, said), f"{promise!r} is not in\n{said}"
    return said


@pytest.mark.parametrize("name", sorted(PROMISED.keys() - {"language_model_spike"}))
def test_an_example_prints_what_it_promises(command: Launcher, tmp_path: Path, name: str) -> None:
    outcome(command, name, tmp_path)


def test_the_language_model_is_better_without_the_bad_batches(command: Launcher, tmp_path: Path) -> None:
    said = outcome(command, "language_model_spike", tmp_path)
    bare, recovered = re.search(r"Loss on other text: ([\d.]+); with 6 steps skipped: ([\d.]+)$", said).groups()
    assert float(recovered) < float(bare)


def test_all_six_are_tested_and_fit_on_two_screens() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == PROMISED.keys()
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) < 80, path
        assert "What you will see:" in (ast.get_docstring(ast.parse(text)) or ""), path
