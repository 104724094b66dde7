"""Spikes, NaN and kills together: what SpikeRecovery makes of a run that is killed and resumed."""

import math
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_stability import SpikeRecovery
from lightning_stability.callbacks.base import StabilityCallback
from tests import runs
from tests.callbacks.test_spike_recovery import assert_same, make_data, make_module

# Killed between a spike and its rewind.


@pytest.mark.parametrize(
    ("kill_after", "accumulate"),
    [
        (102, 1),
        *(pytest.param(after, 1, marks=pytest.mark.slow) for after in (101, 103, 104)),
        pytest.param(207, 2, marks=pytest.mark.slow),
    ],
)
def test_a_kill_before_the_rewind_changes_nothing(tmp_path: Path, kill_after: int, accumulate: int) -> None:
    script = Path(__file__).parents[1] / "spike_kills.py"
    words = [sys.executable, str(script), str(tmp_path), str(kill_after), str(accumulate)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    whole, resumed = (torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in ("whole", "resumed"))
    assert whole["counts"][:2] == (6, 1)
    assert_same(resumed, whole)


# Whatever comes.


class Kill(Exception):
    """Ends a run in the middle."""


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_whatever_comes_the_state_is_finite_and_every_batch_accounted_for(data: st.DataObject) -> None:
    one, batches = runs.load_namespace("pytorch_lightning"), 90
    place = st.integers(0, batches - 1)
    spikes = data.draw(st.dictionaries(place, st.sampled_from([50.0, 1e6, math.nan, math.inf]), max_size=8))
    broken = data.draw(st.sets(place, max_size=2))
    kill_at = data.draw(st.none() | st.integers(5, batches - 1))
    fused, precision = data.draw(st.booleans()), data.draw(st.sampled_from(["32", "fp16"]))
    seen: list[int] = []

    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == kill_at and kill_at not in killed:
            killed.append(kill_at)
            raise Kill
        seen.append(batch_idx)
        if batch_idx in broken:
            broken.discard(batch_idx)
            with torch.no_grad():
                self.net.b.weight.view(-1)[0] = math.nan

    killed: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        while True:
            recovery = SpikeRecovery(every_n_steps=7)
            counted = CountOutcomes()
            seen.clear()
            saves = one.callbacks.ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=1)
            module = make_module(
                one,
                lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, fused=fused),
                on_train_batch_start=on_train_batch_start,
            )
            plugins = runs.fp16(one, init_scale=256.0) if precision == "fp16" else None
            callbacks = [recovery, counted, saves]
            trainer = runs.trainer(one, callbacks=callbacks, plugins=plugins, enable_checkpointing=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    trainer.fit(module, make_data(batches, spikes), ckpt_path=checkpoint)
                except Kill:
                    checkpoint = saves.best_model_path or None
                    continue
            break
    assert all(bool(tensor.isfinite().all()) for tensor in module.state_dict().values())
    assert sum(counted.outcomes.values()) == len(seen)
    assert counted.outcomes["spike"] <= recovery.spikes
    assert recovery.left_out <= batches + len(seen)


class CountOutcomes(StabilityCallback):
    """Counts what became of each step."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()

    def on_record(self, record: Any) -> None:
        self.outcomes[str(record.outcome.value)] += 1
