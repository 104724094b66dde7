"""The derivative of a singular value decomposition divides by the differences of singular values, and two are equal."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader


class Orthogonalize(nn.Module):
    def forward(self, matrix):
        u, _, v = torch.linalg.svd(matrix)  # here
        return u[..., :1] @ v[..., :1, :]


class Procrustes(Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.align = Orthogonalize()

    def training_step(self, batch, batch_idx):
        return (self.align(batch * self.scale) - batch).pow(2).mean()


def program(seed):
    data = torch.randn(24, 3, 3)
    round_one = draw(seed, 8)
    data[8 + round_one] = torch.eye(3)
    expected = Expected("backward", "align", __file__, cause="undefined_gradient")
    return Program(Procrustes(), loader(list(data)), expected)
