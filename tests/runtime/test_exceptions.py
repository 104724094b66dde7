"""A step that raises because of a non-finite batch is skipped and named; every other exception is the user's."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_stability import NaNEarlyStop
from tests import runs

pl = runs.load_namespace("pytorch_lightning")


def in_the_forward_pass(self, batch, batch_idx):
    out = self.net(batch[0]).mean(1)
    self.log("loss", out.mean(), on_step=True, on_epoch=True)
    return -torch.distributions.Normal(out, 1.0, validate_args=True).log_prob(torch.zeros(len(out))).mean()


def in_the_backward_pass(self, batch, batch_idx):
    loss = self.net(batch[0]).pow(2).mean()
    self.log("loss", loss, on_step=True, on_epoch=True)
    return loss if bool(loss.isfinite()) else torch.tensor(1e9)  # as pytorch-forecasting's metrics do


def by_hand(self, batch, batch_idx):
    optimizer = self.optimizers()
    optimizer.zero_grad()
    self.manual_backward(in_the_backward_pass(self, batch, batch_idx))
    optimizer.step()


def train(step, bad=(2,), callbacks=(), options=None, **attributes):
    torch.manual_seed(1)
    x = torch.randn(12, 6)
    for batch in bad:
        x[2 * batch + 1, 3] = torch.nan
    module = runs.make_module(pl, training_step=step)
    for name, value in attributes.items():
        setattr(module, name, value)
    trainer = runs.trainer(pl, callbacks=[*callbacks], max_epochs=1, **(options or {}))
    trainer.fit(module, DataLoader(TensorDataset(x), batch_size=2))
    return module, trainer


RAISES = pytest.mark.parametrize(
    ("step", "what"), [(in_the_forward_pass, "`training_step`"), (in_the_backward_pass, "the backward pass")]
)


@RAISES
@pytest.mark.parametrize("fp16", [False, True])
def test_a_non_finite_batch_that_raises_is_left_out_and_named(step, what, fp16, recwarn):
    def options():
        return {"plugins": runs.fp16(pl, init_scale=256.0)} if fp16 else {}

    module, trainer = train(step, callbacks=[NaNEarlyStop()], options=options())
    [said] = [str(one.message) for one in recwarn if "an update was skipped" in str(one.message)]
    assert f"{what} raised" in said
    assert "`batch[0]` (sample 1, column 3) (epoch 0, batch 2, global step 2)" in said
    assert bool(trainer.callback_metrics["loss_epoch"].isfinite())
    reference, _ = train(
        lambda self, batch, i: None if batch[0].isnan().any() else step(self, batch, i), options=options()
    )
    for name, weight in reference.state_dict().items():
        assert torch.equal(module.state_dict()[name], weight), name


@RAISES
def test_more_of_them_in_a_row_than_patience_end_with_the_exception(step, what):
    with pytest.raises((ValueError, RuntimeError), match=r"Expected parameter|does not require grad"):
        train(step, bad=(2, 3, 4), callbacks=[NaNEarlyStop(patience=2)])


def test_an_exception_over_a_finite_batch_is_the_users_own():
    def step(self, batch, batch_idx):
        return torch.tensor(1.0) if batch_idx == 2 else self.net(batch[0]).mean()

    with pytest.raises(RuntimeError, match="does not require grad"):
        train(step, bad=(), callbacks=[NaNEarlyStop()])


def test_in_manual_optimization_it_is_named_and_ends_the_run(recwarn):
    with pytest.raises(RuntimeError, match="does not require grad"):
        train(by_hand, callbacks=[NaNEarlyStop()], automatic_optimization=False)
    [said] = [str(one.message) for one in recwarn if "raised RuntimeError" in str(one.message)]
    assert "`batch[0]` (sample 1, column 3)" in said


def test_who_detects_anomalies_gets_the_exception(recwarn):
    def step(self, batch, batch_idx):
        return self.net(batch[0]).pow(2).mean()

    with pytest.raises(RuntimeError, match="returned nan values"):
        train(step, callbacks=[NaNEarlyStop()], options={"detect_anomaly": True})
    [said] = [str(one.message) for one in recwarn if "raised RuntimeError" in str(one.message)]
    assert "`batch[0]` (sample 1, column 3)" in said
