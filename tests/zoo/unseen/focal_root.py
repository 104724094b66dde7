"""Focal loss with gamma = 0.5: where the net is perfectly sure, (1 - p) ** 0.5 is 0 and has no slope.

The loss is finite and 0 there, which is right; only its derivative is not.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Focal(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        x, label = batch
        right = torch.sigmoid(self.net(x)[:, 0] * (2 * label - 1) * 1.0 + 40 * x[:, 0])
        return -((1 - right) ** 0.5 * torch.log(right)).mean()  # here


def program(seed):
    data = [(0.02 * torch.randn(6), torch.tensor(float(i % 2))) for i in range(24)]
    data[8 + draw(seed, 8)][0][0] = 1.0
    expected = Expected("backward", "", __file__, cause="undefined_gradient")
    return Program(Focal(), loader(data), expected)
