"""A picture is brightened by a power of its values; a sharpening filter has made some of them negative."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader


class Gamma(nn.Module):
    def __init__(self):
        super().__init__()
        self.exponent = nn.Parameter(torch.tensor(0.45))

    def forward(self, picture):
        return picture**self.exponent  # here


class Brighten(Module):
    def __init__(self):
        super().__init__()
        self.sharpen = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        nn.init.zeros_(self.sharpen.weight)
        with torch.no_grad():
            self.sharpen.weight[0, 0, 1] = torch.tensor([-1.0, 3.0, -1.0])
        self.gamma = Gamma()
        self.net = nn.Conv2d(1, 1, 1)

    def training_step(self, batch, batch_idx):
        return self.net(self.gamma(self.sharpen(batch))).pow(2).mean()


def program(seed):
    pictures = 0.5 + 0.05 * torch.rand(24, 1, 6, 6)
    edge = draw(seed, 8)
    pictures[16 + edge, 0, 2, 3] = 5.0
    expected = Expected("forward", "gamma", __file__, samples=[edge], cause="undefined_operation")
    return Program(Brighten(), loader(list(pictures)), expected)
