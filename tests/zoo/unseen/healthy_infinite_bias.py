"""An attention bias of -inf for every key but the own one: one key is free, and softmax is exactly 1 there."""

import torch
from torch import nn

from tests.zoo.program import Module, Program, loader

held_out = True


class Own(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))

    def training_step(self, batch, batch_idx):
        hidden = self.net(batch)
        bias = torch.full((len(batch), len(batch)), float("-inf")).fill_diagonal_(0.0)
        return (torch.softmax(hidden @ hidden.T + bias, dim=1) @ hidden).pow(2).mean()


def program(seed):
    return Program(Own(), loader(list(torch.randn(24, 6))))
