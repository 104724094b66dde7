"""report.html, opened in a real browser: nothing is asked for, nothing is complained of, all is text."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from torch import nn

from lightning_stability.diagnosis import diagnose, read_incident, write_incident
from lightning_stability.diagnosis.html import page_of, write_page
from lightning_stability.diagnosis.layers import measure_layers
from lightning_stability.diagnosis.report import make_report
from lightning_stability.diagnosis.search import find_origin
from tests.browser import CHROMIUM, browser
from tests.zoo.program import Module, Program, loader
from tests.zoo.recording import record
from tests.zoo.test_zoo import train

EVIL = "<script>console.log('ran')</script><img src=http://example.invalid/x onerror=console.log(1)>"
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")


def history(steps: int) -> list[dict[str, Any]]:
    return [
        {"step": step, "loss": 0.7 - step / 400, "grad_norm": 10.0 ** (step / 30), "loss_scale": 1024.0}
        for step in range(steps)
    ]


def details(**more: Any) -> dict[str, Any]:
    return {"step": 87, "epoch": 1, "batch_idx": 23, "dataset_indices": [list(range(100, 108))], **more}


def recorded(step: Any, folder: Path, **more: Any) -> dict[str, Any]:
    """An incident, and its report without the scripts, whose making takes seconds."""
    write_incident(folder, step, history(87), details(**more))
    return make_report(True, find_origin(step), step.failed, [], True, layers=measure_layers(step))


CAUSE = {
    "cause": "nonfinite_input", "module": "conv", "tensor": "batch", "samples": [0], "op": "conv", "file": None,
    "line": None, "confidence": 0.98, "summary": f"the loader gave NaN {EVIL}", "evidence": ["`nan_to_num` cures it"],
    "remedy": f"dataset = Subset(dataset, good)  # {EVIL}", "dataset_indices": [100], "facts": {},
}  # fmt: skip


@NEEDS_CHROMIUM
def test_the_page_asks_for_nothing_and_whatever_it_is_given_is_text(tmp_path):
    folder = tmp_path / "1-step87"
    report = recorded(train("broken_sensor", 0)[1], folder, epoch=EVIL)
    report["causes"] = [CAUSE, CAUSE | {"cause": EVIL, "confidence": 0.1}]
    report["counterfactuals"] = [{"name": EVIL, "change": EVIL, "finite": True, "outcome": "finite", "seconds": 0.1}]
    report["excluded"] = [{"name": "precision", "tried": EVIL, "came": "the loss is nan"}]
    report["notes"] = [EVIL]
    report["layers"][0]["module"] = EVIL + "$x_1$"
    report["repro"] = {"path": None, "why_not": EVIL}
    assert write_page(folder, report) is None
    page = folder / "report.html"
    assert page.stat().st_size < 1_500_000
    backgrounds = set()
    with browser() as opened:
        for width in (390, 1280):
            for dark in (False, True):
                shown = "[...document.querySelectorAll('.chart')].filter(c => c.offsetHeight).length"
                scripts = "document.scripts.length + document.querySelectorAll('[onerror]').length"
                seen = opened.look(page, width, dark, "document.body.innerText", shown, scripts)
                assert seen.messages == []
                assert [url for url in seen.requests if not url.startswith("data:")] == [page.as_uri()]
                assert seen.overflow == 0
                text, charts, code = seen.values
                assert text.index("nonfinite_input") < text.index("Before the event")  # the answer comes first
                assert EVIL in text
                assert (charts > 4, code) == (True, 0)
                backgrounds.add((dark, tuple(imread(io.BytesIO(seen.picture))[5, 5, :3] > 0.5)))
    assert backgrounds == {(False, (True, True, True)), (True, (False, False, False))}


def test_the_layers_are_in_forward_order_with_the_origin_and_the_limit(tmp_path):
    step = train("input_statistics", 0)[1]
    report = recorded(step, tmp_path / "incident")
    layers = report["layers"]
    assert [layer["module"] for layer in layers] == [
        "normalize",
        "encoder.patch",
        "encoder.norm",
        "encoder",
        "head",
    ]
    assert layers[0]["output"]["largest"] > 65504  # does not fit fp16
    assert (layers[0]["dtype"], layers[1]["dtype"]) == ("float32", "float16")
    assert layers[1]["output"]["nonfinite"] > 0
    json.dumps(report, allow_nan=False)
    text = page_of(read_incident(tmp_path / "incident"), report)
    assert "fp16 ends at 65,504" in text
    assert "encoder.patch  (origin)" in text


class Deep(Module):
    """A container, a layer that is called twice, one that gives no tensor, and a gradient that comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def training_step(self, batch, batch_idx):
        return (self.body(self.body(batch)).sum(dim=1) * 0).sqrt().mean()


def test_a_layer_is_told_once_with_the_gradient_at_its_output():
    step, _ = record(Program(Deep(), loader(list(torch.randn(8, 4)))))
    layers = measure_layers(step)
    assert [(layer["module"], layer["calls"]) for layer in layers] == [("body.0", 2), ("body.1", 2)]
    assert layers[1]["output"]["largest"] <= 1.0
    assert layers[0]["gradient"]["nonfinite"] > 0


def test_images_rows_and_tokens_are_drawn_as_what_they_are(tmp_path):
    report = recorded(train("gamma_correction", 0)[1], tmp_path / "image")
    text = page_of(read_incident(tmp_path / "image"), report)
    assert 'src="data:image/png;base64,' in text
    assert "one of the others" in text
    report = recorded(train("masked_attention", 0)[1], tmp_path / "tokens")
    assert "<code>0 0 0 0 0</code>" in page_of(read_incident(tmp_path / "tokens"), report)


def test_without_the_extra_the_diagnosis_says_what_to_install(tmp_path, monkeypatch):
    step = train("no_epsilon", 0)[1]
    write_incident(tmp_path / "incident", step)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    report = diagnose(tmp_path / "incident", module=step.module)
    [note] = [note for note in report["notes"] if "report.html" in note]
    assert "pip install 'lightning-stability[report]'" in note
    assert report["origin"]["phase"] == "optimizer"
    assert report["repro"]["mended"] == "repro_mended.py"
    assert not (tmp_path / "incident" / "report.html").exists()
    assert (tmp_path / "incident" / "report.json").is_file()
