"""fp16 with a loss scale that is too large at first: the scaler skips some updates and halves it. That is its work."""

import torch
from torch import nn

from tests.zoo.program import Module, Program, loader


class Half(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch).pow(2).mean()


def program(seed):
    return Program(Half(), loader(list(torch.randn(32, 8)), 4), precision="16-mixed", loss_scale=2.0**20)
