"""A recurrent net by hand whose matrix has an eigenvalue of 2: after some 130 steps of time the state is infinite."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader


class Cell(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.recurrent = nn.Parameter(torch.eye(width) * 0.9)

    def forward(self, x, state):
        return x + state @ self.recurrent  # here


class Recurrent(Module):
    def __init__(self, unstable=0):
        super().__init__()
        self.save_hyperparameters()
        self.cell = Cell(4)
        self.readout = nn.Linear(4, 1)
        with torch.no_grad():
            self.cell.recurrent[unstable, unstable] = 2.0

    def training_step(self, batch, batch_idx):
        state = torch.zeros_like(batch[:, 0])
        for x in batch.unbind(dim=1):
            state = self.cell(x, state)
        return self.readout(state).tanh().mean()


def program(seed):
    data = list(1 + torch.rand(16, 150, 4))
    expected = Expected(
        "forward", "cell", __file__, cause=("extreme_weights", "divergence"), cause_tensor="cell.recurrent"
    )
    return Program(Recurrent(draw(seed, 4)), loader(data), expected)
