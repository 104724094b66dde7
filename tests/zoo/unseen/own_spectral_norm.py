"""Spectral normalisation by hand; the last layer starts at zero, as residual ones do, and divided by its norm: 0 / 0.

The weights are as meant and finite; the division lacks an epsilon.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Normalised(nn.Linear):
    def forward(self, x):
        weight = self.weight / torch.linalg.matrix_norm(self.weight.detach(), 2)  # here
        return nn.functional.linear(x, weight, self.bias)


class Critic(Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Normalised(6, 6) for _ in range(3)])

    def training_step(self, batch, batch_idx):
        for layer in self.layers:
            batch = batch + torch.tanh(layer(batch))
        return batch.pow(2).mean()


def program(seed):
    module, place = Critic(), draw(seed, 3)
    nn.init.zeros_(module.layers[place].weight)
    expected = Expected("forward", f"layers.{place}", __file__, cause="undefined_operation")
    return Program(module, loader(list(torch.randn(24, 6))), expected)
