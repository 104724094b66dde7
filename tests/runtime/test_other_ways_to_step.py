"""Optimizers, backward passes and skips that Lightning does not know of are guarded, counted and named."""

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_stability import NaNEarlyStop
from tests import runs

pl = runs.load_namespace("pytorch_lightning")
KEPT: dict[str, Any] = {}


def sgd(module: Any) -> Any:
    return torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)


def made_for_each_batch(self: Any, batch: Any, batch_idx: int) -> None:
    step(sgd(self), self, batch)


def made_in_the_first_batch(self: Any, batch: Any, batch_idx: int) -> None:
    self.own = getattr(self, "own", None) or sgd(self)
    step(self.own, self, batch)


def kept_elsewhere(self: Any, batch: Any, batch_idx: int) -> None:
    if KEPT.get("of") is not self:
        KEPT.update(of=self, optimizer=sgd(self))
    step(KEPT["optimizer"], self, batch)


def gradients_by_hand(self: Any, batch: Any, batch_idx: int) -> None:
    optimizer = self.optimizers()
    parameters = list(self.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss_of(self, batch), parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()


def left_out_by_itself(self: Any, batch: Any, batch_idx: int) -> None:
    loss = loss_of(self, batch)
    self.log("loss", loss, on_step=False, on_epoch=True)
    if loss.isfinite():
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def loss_of(module: Any, batch: Any) -> Any:
    return module.net(batch[0]).pow(2).mean()


def step(optimizer: Any, module: Any, batch: Any) -> None:
    optimizer.zero_grad()
    loss_of(module, batch).backward()
    optimizer.step()


def train(training_step: Any, bad: int | None, callbacks: Any = (), **attributes: Any) -> Any:
    torch.manual_seed(1)
    x = torch.randn(12, 6)
    if bad is not None:
        x[2 * bad + 1, 3] = torch.nan
    module = runs.make_module(pl, optimizer=attributes.pop("optimizer", sgd), training_step=training_step)
    module.automatic_optimization = False
    trainer = runs.trainer(pl, callbacks=[*callbacks], max_epochs=1)
    trainer.fit(module, DataLoader(TensorDataset(x), batch_size=2))
    return module, trainer


STEPS = [made_for_each_batch, made_in_the_first_batch, kept_elsewhere, gradients_by_hand]


@pytest.mark.parametrize("training_step", STEPS)
@pytest.mark.parametrize("bad", [0, 3])
def test_a_bad_step_does_not_land_even_the_first(training_step: Any, bad: int, recwarn: Any) -> None:
    optimizer = sgd if training_step is gradients_by_hand else lambda module: []
    module, _ = train(training_step, bad, [NaNEarlyStop()], optimizer=optimizer)
    assert all(bool(weight.isfinite().all()) for weight in module.parameters())
    [said] = [str(one.message) for one in recwarn if "an update was skipped" in str(one.message)]
    assert f"`batch[0]` (sample 1, column 3) (epoch 0, batch {bad}," in said


@pytest.mark.parametrize("training_step", STEPS[:3])
def test_a_good_run_is_bitwise_the_same(training_step: Any) -> None:
    weights = [
        [
            weight.detach().clone()
            for weight in train(training_step, None, callbacks, optimizer=lambda module: [])[0].parameters()
        ]
        for callbacks in ((), [NaNEarlyStop()])
    ]
    assert all(map(torch.equal, *weights))


def test_optimizers_that_are_made_anew_are_let_go_of() -> None:
    import gc
    import weakref

    made: list[Any] = []

    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        optimizer = sgd(self)
        step(optimizer, self, batch)
        made.append(weakref.ref(optimizer))
        gc.collect()
        assert sum(one() is not None for one in made) <= 6

    x = torch.randn(24, 6)
    module = runs.make_module(pl, optimizer=lambda module: [], training_step=training_step)
    module.automatic_optimization = False
    trainer = runs.trainer(pl, callbacks=[NaNEarlyStop()], max_epochs=1)
    trainer.fit(module, DataLoader(TensorDataset(x), batch_size=2))
    assert len(made) == 12


def test_a_batch_that_a_manual_module_leaves_out_is_counted(recwarn: Any) -> None:
    stop = NaNEarlyStop()
    _, trainer = train(left_out_by_itself, 3, [stop])
    assert bool(trainer.callback_metrics["loss"].isfinite())
    assert stop.state_dict()["skipped_bad"] == 1
    [said] = [str(one.message) for one in recwarn if "an update was skipped" in str(one.message)]
    assert "it made no update (epoch 0, batch 3" in said


def test_nan_that_is_logged_between_updates_ends_no_run(recwarn: Any) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 5:
            self.log("score", torch.tensor(torch.nan), on_step=False, on_epoch=True)
        else:
            step(self.optimizers(), self, batch)

    _, trainer = train(training_step, None, [NaNEarlyStop(patience=1)])
    assert trainer.fit_loop.epoch_progress.current.completed == 1
