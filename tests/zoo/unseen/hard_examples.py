"""Only the examples with a loss above 1e-3 are trained; when the data are easy there are none, and their mean is NaN.

The easy batch is sound; a mean over no examples is not.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Miner(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        x, target = batch
        error = (self.net(x)[:, 0] * x.abs().amax(dim=1) - target).pow(2)
        return error[error > 1e-3].mean()  # here


def program(seed):
    data = [(torch.randn(6), torch.randn(())) for _ in range(24)]
    easy = 8 + 8 * draw(seed, 2)
    data[easy : easy + 8] = [(torch.zeros(6), torch.tensor(0.0)) for _ in range(8)]
    return Program(Miner(), loader(data), Expected("forward", "", __file__, cause="empty_reduction"))
