"""Supervised contrastive learning: the mean over the pairs of a class; in one batch no class comes twice.

The mean of no pairs at all is NaN.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Contrast(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))

    def training_step(self, batch, batch_idx):
        x, label = batch
        z = nn.functional.normalize(self.net(x), dim=1)
        score = torch.log_softmax(z @ z.T / 0.5, dim=1)
        pair = (label[:, None] == label[None]) & ~torch.eye(len(label), dtype=torch.bool)
        return -score[pair].mean()  # here


def program(seed):
    data = [(torch.randn(6), torch.tensor(i % 3)) for i in range(24)]
    start = 8 + 8 * draw(seed, 2)
    data[start : start + 8] = [(torch.randn(6), torch.tensor(i)) for i in range(8)]
    return Program(Contrast(), loader(data), Expected("forward", "", __file__, cause="empty_reduction"))
