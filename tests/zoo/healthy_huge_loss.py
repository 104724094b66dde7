"""A loss of 1e30, which is far from nice and finite."""

import torch
from torch import nn

from tests.zoo.program import Module, Program, loader


class Huge(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        return 1e15 * (1e14 + self.net(batch).pow(2).mean() * 1e15)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-30)


def program(seed):
    return Program(Huge(), loader(list(1 + torch.rand(24, 8))))
