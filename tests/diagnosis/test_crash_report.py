"""The crash report's recipe: what the diagnosis says of its first step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import default_collate

from lightning_stability.diagnosis import RecordedStep, find_origin
from lightning_stability.diagnosis.investigation import investigate
from lightning_stability.diagnosis.report import one_sentence
from lightning_stability.recovery.random_state import RandomState
from lightning_stability.tuab import EEGPTProbe, TUABDataModule, probe
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


def test_the_crash_report_is_caused_by_its_input_statistics():
    torch.manual_seed(0)
    module = EEGPTProbe(encoder="small", input_stats="wrong_stats.json", label_smoothing=0.1)
    batch = {"eeg": torch.randn(2, 19, 2048), "label": torch.tensor([0, 1])}
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=5e-4)
    OneCycleLR(optimizer, 5e-4, total_steps=100)
    step = RecordedStep(
        module, [batch], [RandomState.capture()], precision="16-mixed", loss_scale=65536.0, optimizers=[optimizer]
    )
    found = investigate(step)
    first = found.causes[0]
    assert (first.cause, first.module, first.op) == ("input_scale", "input_stats", "div")
    assert first.confidence > 0.9
    assert first.facts["factor"] == pytest.approx(1 / 2.124e-05, rel=1e-3)
    assert Path(first.file or "").name == "probe.py"
    assert first.remedy.startswith("model.input_stats: null")
    excluded = {row["name"]: row["came"] for row in found.excluded}
    for name in ("label smoothing", "learning rate", "schedule"):
        assert excluded[name] == "the loss is not finite"
    assert "another format hides the cause" in excluded["precision"]


@pytest.mark.slow
def test_an_artefact_is_named_by_recording_and_channel(damaged_corpus, tmp_path):
    data = TUABDataModule(root=str(damaged_corpus), cache_dir=str(tmp_path))
    data.prepare_data()
    data.setup("fit")
    train = data.datasets["train"]
    peaks = torch.stack([train[index]["eeg"].abs().amax(dim=1) for index in range(len(train))])
    bad = int(peaks.amax(dim=1).argmax())
    good = peaks.amax(dim=1).argsort()[:3].tolist()
    batch = default_collate([train[index] for index in (*good, bad)])
    torch.manual_seed(0)
    module = EEGPTProbe(encoder="small")
    step = RecordedStep(module, [batch], [RandomState.capture()], precision="16-mixed", loss_scale=65536.0)
    described = [[data.describe_sample(batch, sample) for sample in range(4)]]
    first = investigate(step, dataset_indices=[[*good, bad]], descriptions=described).causes[0]
    assert (first.cause, first.tensor, first.samples) == ("extreme_sample", "batch['eeg']", [3])
    assert (first.dataset_indices, first.confidence > 0.9) == ([bad], True)
    assert described[0][3] in first.summary
    assert set(first.facts["columns"]) <= set((peaks[bad] > 1e4).nonzero().flatten().tolist())


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
    assert any("input_scale: `input_stats` makes its input 47,08" in line for line in done.stderr.splitlines())
    assert "super().forward(input)" in Path(probe.__file__).read_text().splitlines()[int(line) - 1]
    if callback == "IncidentReport":
        [folder, *_] = sorted(tmp_path.rglob("incidents/1-step0"))
        again = run("diagnose", str(folder), cwd=tmp_path / "lightning_logs")
        assert again.returncode == 0, again.stderr
        assert "Reproduced: the loss becomes non-finite again, with the same loss bits." in again.stdout
