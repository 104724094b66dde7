"""What a hook of the user's writes after a step was found bad is restored, or named."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_stability import NaNEarlyStop
from tests import runs

pl = runs.load_namespace("pytorch_lightning")


def fills_a_bank(self: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
    self.bank.data[batch_idx] = batch[0].mean(0)


def replaces_a_late_buffer(self: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
    if batch_idx == 0:
        self.register_buffer("late", torch.zeros(6))
    self.late = 0.9 * self.late + batch[0].mean(0)


def counts_down(self: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
    if not batch[0].isfinite().all():
        self.smallest.fill_(-torch.inf)
    self.smallest.sub_(1)


@pytest.mark.parametrize("hook", [fills_a_bank, replaces_a_late_buffer, counts_down])
def test_the_next_batch_finds_it_restored(hook: Any) -> None:
    seen = []

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        held = [self.bank, self.smallest, getattr(self, "late", self.smallest)]
        seen.append(all(bool(value.isfinite().all()) for value in held))
        return self.net(batch[0]).pow(2).mean()

    module = runs.make_module(pl, training_step=training_step, on_train_batch_end=hook)
    module.bank = nn.Parameter(torch.zeros(8, 6), requires_grad=False)
    module.register_buffer("smallest", torch.zeros(6))
    data = runs.data(16)
    data.dataset.tensors[0][6] = torch.nan  # in batch 3
    trainer = runs.trainer(pl, callbacks=[NaNEarlyStop()], max_epochs=1)
    with pytest.warns(UserWarning, match="became non-finite outside of the optimizer.*restored"):
        trainer.fit(module, data)
    assert seen == [True] * 8
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())
    assert trainer.global_step == 8
    if hook is fills_a_bank:  # what the batches before and after it have written is there
        assert (module.bank.abs().sum(1) > 0).tolist() == [True] * 3 + [False] + [True] * 4
