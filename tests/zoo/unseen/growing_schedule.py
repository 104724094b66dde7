"""An exponential schedule whose gamma was typed as 10 instead of 0.1: SGD leaves fp32 within a dozen steps.

Data, loss and first weights are sound; the weights grow from step to step.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, loader

held_out = True


class Regression(Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(6, 1)

    def training_step(self, batch, batch_idx):
        return (self.line(batch) - batch.sum(dim=1, keepdim=True)).pow(2).mean()  # here

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=10.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def program(seed):
    expected = Expected(
        "forward",
        "",
        __file__,
        cause="divergence",
        cause_module=("line", ""),
        cause_tensor=("line.weight", "line.bias"),
    )
    return Program(Regression(), loader(list(torch.randn(320, 6))), expected)
