"""Points are normalised per cell by `std`; in one batch a cell holds a single point, and n - 1 is 0.

One point in a cell is a sane batch; the deviation of a single value is not defined.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Cells(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))

    def training_step(self, batch, batch_idx):
        x, cell = batch
        hidden = self.net(x)
        parts = [hidden[cell == i] for i in cell.unique()]
        spread = torch.stack([part.var(dim=0).mean() for part in parts])  # here
        return hidden.pow(2).mean() + spread.mean()


def program(seed):
    data = [(torch.randn(6), torch.tensor(i % 2)) for i in range(24)]
    alone = 8 + draw(seed, 8)
    data[alone] = (data[alone][0], torch.tensor(2))
    expected = Expected("forward", "", __file__, cause=("undefined_operation", "empty_reduction"))
    return Program(Cells(), loader(data), expected)
