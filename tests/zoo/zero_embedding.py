"""Contrastive learning: embeddings are divided by their length, and a ReLU has made one of them all zeros."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader


class UnitLength(nn.Module):
    def forward(self, x):
        return x / x.norm(dim=-1, keepdim=True)  # here


class Contrastive(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU())
        self.unit = UnitLength()

    def training_step(self, batch, batch_idx):
        a, b = self.unit(self.net(batch)), self.unit(self.net(batch + 0.1 * torch.randn_like(batch)))
        return nn.functional.cross_entropy(a @ b.T / 0.1, torch.arange(len(batch)))


def program(seed):
    module = Contrastive()
    nn.init.uniform_(module.net[0].weight)
    data = torch.rand(24, 6)
    dark = draw(seed, 8)
    data[8 + dark] = -50.0
    expected = Expected("forward", "unit", __file__, samples=[dark], cause="undefined_operation")
    return Program(module, loader(list(data)), expected)
