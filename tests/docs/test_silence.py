"""Our messages can be silenced as docs/installed.md says, and no filter for warnings hides a skip by chance."""

from __future__ import annotations

import pytest

from tests.docs.blocks import ROOT
from tests.docs.commands import VARIABLE

FIT = """
import logging, warnings
import torch
from torch.utils.data import DataLoader, TensorDataset
from tests.docs.prelude import Model, Trainer

{silence}
inputs = torch.randn(32, 6)
inputs[9:13, 3] = float("nan")
trainer = Trainer(max_epochs=1, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(Model(), DataLoader(TensorDataset(inputs), batch_size=4))
"""
LINES = 'logging.getLogger("pytorch_lightning").setLevel("ERROR")'
FILTER = 'warnings.simplefilter("ignore")'
CAPTURE = "logging.captureWarnings(True)"
SKIP, START, COUNTS = "an update was skipped", "are active, as in every Trainer here", "6 updates, 2 skipped"


@pytest.mark.parametrize(
    ("silence", "said"),
    [
        (LINES, (True, False, False)),
        (FILTER, (True, True, True)),
        (f'{CAPTURE}; logging.getLogger("py.warnings").setLevel("ERROR")', (False, True, True)),
    ],
    ids=["lines", "advice", "what happened"],
)
def test_messages_are_silenced_as_the_page_says(silence, said, command, tmp_path):
    page = (ROOT / "docs/installed.md").read_text()
    assert all(f"`{part}`" in page for part in silence.split("; ")[:1])
    done = command("-c", FIT.format(silence=silence), cwd=tmp_path, env={VARIABLE: None})
    assert done.returncode == 0, done.stderr
    output = done.stdout + done.stderr
    assert tuple(text in output for text in (SKIP, START, COUNTS)) == said, output
