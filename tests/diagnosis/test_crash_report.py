"""The crash report's recipe: what the diagnosis says of its first step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lightning_stability.diagnosis import RecordedStep, find_origin
from lightning_stability.diagnosis.report import one_sentence
from lightning_stability.recovery.random_state import RandomState
from lightning_stability.tuab import EEGPTProbe, probe
from tests.command import run


def test_the_crash_report_is_traced_to_where_fp16_ends():
    torch.manual_seed(0)
    module = EEGPTProbe(encoder="small", input_stats="wrong_stats.json", label_smoothing=0.1)
    batch = {"eeg": torch.randn(2, 19, 2048), "label": torch.tensor([0, 1])}
    step = RecordedStep(module, [batch], [RandomState.capture()], precision="16-mixed", loss_scale=65536.0)
    sentence = one_sentence(find_origin(step))
    assert sentence.startswith("the first non-finite value was made by the cast to float16 in module `adapter`, ")
    assert "tuab/probe.py:" in sentence
    assert "; the values that went in reach 2" in sentence


@pytest.mark.slow
@pytest.mark.parametrize("callback", ["NaNEarlyStop", "IncidentReport"])
def test_the_crash_recipe_names_the_module_and_line_of_its_origin(callback, corpus, tmp_path):
    words = ["--config=tuab_crash", f"--data.root={corpus}", "--data.batch_size=4", f"--trainer.callbacks+={callback}"]
    done = run("fit", *words, "--trainer.limit_train_batches=12", "--trainer.limit_val_batches=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = "The first non-finite value was made by the cast to float16 in module `adapter`, "
    [said] = [line for line in done.stderr.splitlines() if found in line][:1]
    assert (
        said.startswith("  origin: " if callback == "NaNEarlyStop" else "IncidentReport: ")
        or "IncidentReport: " in said
    )
    [line] = re.findall(r"tuab/probe\.py:(\d+)", said)
    assert "super().forward(input)" in Path(probe.__file__).read_text().splitlines()[int(line) - 1]
    if callback == "IncidentReport":
        [folder, *_] = sorted(tmp_path.rglob("incidents/1-step0"))
        again = run("diagnose", str(folder), cwd=tmp_path / "lightning_logs")
        assert again.returncode == 0, again.stderr
        assert "Reproduced: the loss becomes non-finite again, with the same loss bits." in again.stdout
