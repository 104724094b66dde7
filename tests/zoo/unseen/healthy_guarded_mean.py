"""A mean over a mask that is empty in one batch, divided by at least 1."""

import torch
from torch import nn

from tests.zoo.program import Module, Program, loader

held_out = True


class Masked(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        error = self.net(batch)[:, 0].pow(2)
        mask = batch[:, 0] > 0
        return (error * mask).sum() / mask.sum().clamp(min=1)


def program(seed):
    data = torch.randn(24, 6)
    data[8:16, 0] = -1
    return Program(Masked(), loader(list(data)))
