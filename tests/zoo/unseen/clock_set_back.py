"""Events of a user with the log of the time since the last one; a clock was set back, and log1p(-3) is NaN.

The gap of -3 is not far from the others: the operation has no answer for it.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Events(Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 8, batch_first=True)
        self.head = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        gaps = torch.log1p(batch.diff(dim=1))  # here
        return self.head(self.lstm(gaps[..., None])[0]).pow(2).mean()


def program(seed):
    data = [torch.cumsum(torch.rand(7), dim=0) for _ in range(24)]
    user = draw(seed, 8)
    data[8 + user][3:] -= 3
    expected = Expected("forward", "", __file__, samples=[user], cause="undefined_operation")
    return Program(Events(), loader(data), expected)
