"""`where` discards the logarithm of 0 in the forward pass; in the backward pass 0 / 0 comes back out of it."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader, mlp


class Entropy(nn.Module):
    def forward(self, p):
        return -torch.where(p > 0, p * p.log(), 0.0).sum(dim=-1).mean()  # here


class Gated(Module):
    """A mixture of experts whose gate is made sparse, with the entropy of the gate as a penalty."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 4)
        self.experts = nn.ModuleList(mlp(6, 8, 1) for _ in range(4))
        self.entropy = Entropy()

    def training_step(self, batch, batch_idx):
        gate = self.gate(batch).softmax(dim=-1)
        gate = gate * (gate > 0.05)
        mixed = sum(gate[:, i] * expert(batch).squeeze(1) for i, expert in enumerate(self.experts))
        return mixed.pow(2).mean() + 0.1 * self.entropy(gate)


def program(seed):
    data = 0.1 * torch.randn(24, 6)
    data[16 + draw(seed, 8)] *= 1000  # a gate is shut for this one
    expected = Expected("backward", "entropy", __file__, cause="undefined_gradient")
    return Program(Gated(), loader(list(data)), expected)
