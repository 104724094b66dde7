"""Private names of Lightning and torch are where `internals.py` looks for them."""

from __future__ import annotations

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_stability.internals import (
    Overrides,
    foreach_copies,
    foreach_norms,
    foreach_scale_,
    foreach_subtract_,
    found_inf_tensors,
    is_flattened,
    logger_prefix,
    loss_scale,
    unscales_itself,
)


class Thing:
    def act(self):
        return "own"


def test_overrides_restore_in_reverse_order():
    thing, overrides = Thing(), Overrides()
    overrides.set(thing, "act", lambda: "first")
    overrides.set(thing, "act", lambda: "second")
    assert thing.act() == "second"
    overrides.restore()
    assert thing.act() == "own"
    assert vars(thing) == {}


def test_overrides_leave_what_somebody_set_over_them():
    thing, overrides = Thing(), Overrides()
    overrides.set(thing, "act", lambda: "ours")
    thing.act = lambda: "theirs"
    overrides.restore()
    assert thing.act() == "theirs"


# --- The training loop ---


# --- Precision plugins and optimizers ---


@pytest.mark.parametrize(("fused", "gradient"), [(False, 1.0), (False, float("inf")), (True, 1.0)])
def test_a_scaler_has_its_scale_and_what_it_found(fused, gradient):
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight], fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert loss_scale(scaler) is None
    assert found_inf_tensors(scaler, optimizer) == []
    scaler.scale(weight.sum() * gradient).backward()
    assert float(loss_scale(scaler)) == 1024.0
    assert unscales_itself(optimizer) is fused
    if not fused:
        scaler.unscale_(optimizer)
        assert [float(found) for found in found_inf_tensors(scaler, optimizer)] == [float(gradient != 1.0)]


def test_foreach_functions_take_many_tensors_at_once():
    tensors = [torch.full((4,), 60000.0, dtype=torch.float16), torch.tensor([3.0, 4.0])]
    assert [float(norm) for norm in foreach_norms(tensors, torch.float32)] == [120000.0, 5.0]
    copies = foreach_copies(tensors)
    foreach_scale_(tensors[1:], torch.tensor(0.5))
    foreach_subtract_(copies, tensors)
    assert [t.tolist() for t in copies] == [[0.0] * 4, [1.5, 2.0]]


@pytest.mark.parametrize("bad", [None, torch.ones(2).to_sparse()])
def test_foreach_norms_refuses_what_it_cannot_take(bad):
    with pytest.raises((TypeError, AttributeError, NotImplementedError)):
        foreach_norms([torch.ones(2), bad], None)


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_fsdp1_marks_what_it_has_flattened(tmp_path, original):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = FullyShardedDataParallel(torch.nn.Linear(2, 2), use_orig_params=original, device_id=torch.device("cpu"))
        assert [is_flattened(parameter) for parameter in net.parameters()] == [True] * (2 if original else 1)
        assert not is_flattened(torch.nn.Parameter(torch.zeros(1)))
    finally:
        torch.distributed.destroy_process_group()


# --- Loggers ---


@pytest.mark.parametrize("prefix", ["", "run"])
def test_a_loggers_prefix_is_that_of_its_keys(pl, tmp_path, prefix):
    logger = pl.loggers.TensorBoardLogger(tmp_path, prefix=prefix)
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Tags()["scalars"] == [f"{logger_prefix(logger)}loss"]


# --- Checkpoints, loop progress and data loaders ---


# --- Modules, metrics and tensors ---


# --- Autograd and dispatch, for diagnosis ---
