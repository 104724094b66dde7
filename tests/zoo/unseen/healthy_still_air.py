"""Wind as a vector and its angle by atan2; the head starts at zero, and torch gives atan2(0, 0) the slope 0."""

import torch
from torch import nn

from tests.zoo.program import Module, Program, loader

held_out = True


class Wind(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        x, angle = batch
        east, north = self.net(x).unbind(dim=1)
        return (1 - torch.cos(torch.atan2(north, east) - angle)).mean()


def program(seed):
    module = Wind()
    nn.init.zeros_(module.net[2].weight)
    nn.init.zeros_(module.net[2].bias)
    data = [(torch.randn(6), torch.rand(())) for _ in range(24)]
    return Program(module, loader(data))
