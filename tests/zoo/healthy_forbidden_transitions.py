"""The forward algorithm of a hidden Markov model whose forbidden transitions are -inf; each state has a way in."""

import math

import torch
from torch import nn

from tests.zoo.program import Module, Program, loader

held_out = True


class Markov(Module):
    def __init__(self):
        super().__init__()
        self.emission = nn.Linear(3, 4)
        self.transition = nn.Parameter(torch.zeros(4, 4))
        chain = torch.eye(4) + torch.eye(4).roll(1, 1)
        self.register_buffer("allowed", torch.where(chain > 0, 0.0, -math.inf))

    def training_step(self, batch, batch_idx):
        alpha = self.emission(batch[:, 0])
        for x in batch[:, 1:].unbind(dim=1):
            ways = alpha.unsqueeze(2) + self.transition + self.allowed
            alpha = torch.logsumexp(ways, dim=1) + self.emission(x)
        return torch.logsumexp(alpha, dim=1).pow(2).mean()


def program(seed):
    return Program(Markov(), loader(list(torch.randn(24, 5, 3))))
