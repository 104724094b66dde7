"""Spikes, NaN and kills together: what SpikeRecovery makes of a run that is killed and resumed."""

import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_stability import FractionalCheckpoint, SpikeRecovery
from lightning_stability.callbacks.base import StabilityCallback
from lightning_stability.events import read_events
from tests import runs
from tests.callbacks.test_spike_recovery import assert_same, make_data, make_module
from tests.command import launcher

# Killed between a spike and its rewind.


@pytest.mark.parametrize(
    ("kill_after", "accumulate"),
    [
        (102, 1),
        *(pytest.param(after, 1, marks=pytest.mark.slow) for after in (103, 104)),
        pytest.param(207, 2, marks=pytest.mark.slow),
    ],
)
def test_a_kill_before_the_rewind_changes_nothing(tmp_path: Path, kill_after: int, accumulate: int) -> None:
    whole, resumed = killed_and_resumed(tmp_path, kill_after, accumulate)
    assert whole["counts"][:2] == (6, 1)
    assert_same(resumed, whole)


@pytest.mark.slow
def test_a_checkpoint_from_right_before_the_spike_is_gone_back_to(tmp_path: Path) -> None:
    whole, resumed = killed_and_resumed(tmp_path, 101, 1)  # the newest checkpoint is of step 100
    assert resumed["counts"][:2] == whole["counts"][:2]
    assert resumed["counts"][2] == 6 < whole["counts"][2]
    assert all(float(tensor.abs().max()) < 2.0 for tensor in resumed["module"].values())


def killed_and_resumed(folder: Path, kill_after: int, accumulate: int) -> list[dict[str, Any]]:
    script = Path(__file__).parents[1] / "spike_kills.py"
    done = launcher()(str(script), str(folder), str(kill_after), str(accumulate), cwd=folder)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{name}.pt", weights_only=False) for name in ("whole", "resumed")]


# Whatever comes.


class Kill(BaseException):
    """Ends a run in the middle; nothing of ours hears of it in time to save anything."""


class Account(StabilityCallback):
    """What became of each batch, by its place in the epoch, over all starts of a run."""

    def __init__(self, recovery: SpikeRecovery, folder: Path) -> None:
        self.recovery, self.folder = recovery, folder
        self.outcomes: dict[int, str] = {}
        self.left_out: list[tuple[int, int]] = []

    def on_record(self, record: Any) -> None:
        self.outcomes[record.batch_idx] = str(record.outcome.value)

    def on_train_batch_end(self, *args: Any) -> None:
        if self.recovery.rewinds > len(self.left_out):
            left = [event for event in read_events(self.folder) if event["event"] == "rewound"][-1]["left_out"]
            assert left["batches"] == left["last"][1] - left["first"][1] + 1
            self.left_out.append((left["first"][1], left["last"][1]))

    def state_dict(self) -> dict[str, Any]:
        return {"outcomes": dict(self.outcomes), "left_out": list(self.left_out)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.outcomes, self.left_out = dict(state["outcomes"]), [tuple(pair) for pair in state["left_out"]]

    def is_left_out(self, batch: int) -> bool:
        return any(first <= batch <= last for first, last in self.left_out)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_whatever_comes_the_state_is_finite_and_every_batch_accounted_for(data: st.DataObject) -> None:
    one, batches = runs.load_namespace("pytorch_lightning"), 90
    place = st.integers(0, batches - 1)
    spikes = data.draw(st.dictionaries(place, st.sampled_from([50.0, 1e6, math.nan, math.inf]), max_size=12))
    broken = data.draw(st.dictionaries(place, st.sampled_from([math.nan, 2.0**12, 2.0**40]), max_size=2))
    kills = data.draw(st.sets(st.integers(5, batches - 1), max_size=3))
    fused, precision = data.draw(st.booleans()), data.draw(st.sampled_from(["32", "fp16"]))
    max_rewinds = data.draw(st.integers(1, 3))

    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in kills:
            kills.remove(batch_idx)
            raise Kill
        if batch_idx in broken:
            with torch.no_grad():
                self.net.b.weight.view(-1)[0] *= broken.pop(batch_idx)

    def start(folder: Path, checkpoint: Path | None) -> tuple[Any, SpikeRecovery, Account]:
        recovery = SpikeRecovery(every_n_steps=7, max_rewinds=max_rewinds)
        account = Account(recovery, folder)
        saves = FractionalCheckpoint(every_n_epochs=4 / batches, dirpath=folder / "checkpoints")
        module = make_module(
            one,
            lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, fused=fused),
            on_train_batch_start=on_train_batch_start,
        )
        plugins = runs.fp16(one, init_scale=256.0) if precision == "fp16" else None
        loader = StatefulDataLoader(make_data(batches, spikes).dataset, batch_size=4)
        options = {"plugins": plugins, "enable_checkpointing": True}
        logger = one.loggers.CSVLogger(folder, name="", version="")
        trainer = runs.trainer(one, callbacks=[recovery, account, saves], logger=logger, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, loader, ckpt_path=checkpoint)
        return trainer, recovery, account

    with tempfile.TemporaryDirectory() as name:
        folder, checkpoint = Path(name), None
        while True:
            try:
                trainer, recovery, account = start(folder, checkpoint)
                break
            except Kill:
                last = folder / "checkpoints" / "last.ckpt"
                checkpoint = last if last.exists() else None
        ended = [event for event in read_events(folder) if event["event"] == "training_stopped"]

    assert all(bool(tensor.isfinite().all()) for tensor in trainer.lightning_module.state_dict().values())
    assert all(
        bool(torch.as_tensor(v).isfinite().all()) for s in trainer.optimizers[0].state.values() for v in s.values()
    )
    seen = sorted(account.outcomes)
    assert seen == list(range(len(seen)))
    assert len(seen) == batches or ended
    assert recovery.left_out == sum(last - first + 1 for first, last in account.left_out)
    spiked = [batch for batch in seen if account.outcomes[batch] == "spike"]
    assert len(spiked) == recovery.spikes
    if not ended:  # (the end restores the snapshot once more, and leaves nothing to go on with)
        kept = [b for b in seen if account.outcomes[b] == "applied" and not account.is_left_out(b)]
        assert len(kept) == recovery._position
