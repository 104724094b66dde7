"""The crash report's recipe: what the diagnosis says of its first step."""

from __future__ import annotations

import torch

from lightning_stability.diagnosis import RecordedStep, find_origin
from lightning_stability.diagnosis.report import one_sentence
from lightning_stability.recovery.random_state import RandomState
from lightning_stability.tuab import EEGPTProbe


def test_the_crash_report_is_traced_to_where_fp16_ends():
    torch.manual_seed(0)
    module = EEGPTProbe(encoder="small", input_stats="wrong_stats.json", label_smoothing=0.1)
    batch = {"eeg": torch.randn(2, 19, 2048), "label": torch.tensor([0, 1])}
    step = RecordedStep(module, [batch], [RandomState.capture()], precision="16-mixed", loss_scale=65536.0)
    sentence = one_sentence(find_origin(step))
    assert sentence.startswith("the first non-finite value was made by the cast to float16 in module `adapter`, ")
    assert "tuab/probe.py:" in sentence
    assert "; the values that went in reach 2" in sentence
