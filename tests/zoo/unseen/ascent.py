"""Manual optimization with a sign forgotten: the likelihood is descended instead of ascended, and its error grows.

All is finite at first, earlier weights are fine; the objective has no bound.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, loader

held_out = True


class Ascent(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.line = nn.Linear(6, 1)

    def training_step(self, batch, batch_idx):
        loss = -(self.line(batch) - batch.sum(dim=1, keepdim=True)).pow(2).mean()  # here
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=20.0)


def program(seed):
    expected = Expected(
        "forward",
        "",
        __file__,
        cause="divergence",
        cause_module=("line", ""),
        cause_tensor=("line.weight", "line.bias"),
    )
    return Program(Ascent(), loader(list(torch.randn(320, 6))), expected)
