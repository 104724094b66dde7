"""Columns are standardised by the batch's own statistics, and in one batch a column is constant: 0 / 0."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader, mlp


class Standardize(nn.Module):
    def forward(self, table):
        centred = table - table.mean(dim=0)
        return centred / table.std(dim=0)  # here


class Tabular(Module):
    def __init__(self):
        super().__init__()
        self.standardize = Standardize()
        self.net = mlp(6, 16, 1)

    def training_step(self, batch, batch_idx):
        table, target = batch
        return nn.functional.mse_loss(self.net(self.standardize(table)).squeeze(1), target)


def program(seed):
    table = torch.randn(32, 6)
    table[8:16, draw(seed, 6)] = 1.0  # the second batch; a power of two, so that its mean is exact
    data = [(row, torch.zeros(())) for row in table]
    expected = Expected("forward", "standardize", __file__, cause="undefined_operation")
    return Program(Tabular(), loader(data), expected)
