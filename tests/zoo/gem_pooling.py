"""Generalised mean pooling without a floor: an empty feature map has the mean 0, and 0 ** (1/3) no slope."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class GeM(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(3.0))

    def forward(self, maps):
        mean = maps.pow(self.p).mean(dim=(2, 3))
        return mean.pow(1 / self.p)  # here


class Retrieval(Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.pool = GeM()
        self.head = nn.Linear(4, 3)
        nn.init.uniform_(self.conv.weight)

    def training_step(self, batch, batch_idx):
        picture, label = batch
        return nn.functional.cross_entropy(self.head(self.pool(torch.relu(self.conv(picture)))), label)


def program(seed):
    picture = 1 + torch.rand(24, 1, 6, 6)
    dark = draw(seed, 8)
    picture[16 + dark] = -5.0
    data = [(p, torch.tensor(i % 3)) for i, p in enumerate(picture)]
    expected = Expected("backward", "pool", __file__, samples=[dark], cause="undefined_gradient")
    return Program(Retrieval(), loader(data), expected)
