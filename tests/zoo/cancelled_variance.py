"""The variance as the mean of squares minus the square of the mean: of nearly equal values it comes out below 0."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader, mlp

held_out = True


class OwnLayerNorm(nn.Module):
    def forward(self, x):
        mean = x.mean(dim=-1, keepdim=True)
        variance = x.pow(2).mean(dim=-1, keepdim=True) - mean.pow(2)
        return (x - mean) / (variance.sqrt() + 1e-5)  # here


class Sensors(Module):
    def __init__(self):
        super().__init__()
        self.norm = OwnLayerNorm()
        self.net = mlp(7, 16, 1)

    def training_step(self, batch, batch_idx):
        reading, target = batch
        return nn.functional.l1_loss(self.net(self.norm(reading)).squeeze(1), target)


def negative(x):
    return x.pow(2).mean(dim=-1) - x.mean(dim=-1).pow(2) < 0


def program(seed):
    reading = 20 + torch.randn(24, 7)
    still = draw(seed, 8)
    rows = 20 + torch.rand(100, 1).expand(100, 7)  # a room where the temperature is the same everywhere
    reading[16 + still] = rows[negative(rows)][0]
    data = list(zip(reading, torch.zeros(24), strict=True))
    expected = Expected("forward", "norm", __file__, samples=[still], cause="undefined_operation")
    return Program(Sensors(), loader(data), expected)
