"""Attention within windows of a padded picture: one window of one picture is padding only, and every key is -inf.

softmax over a row with no free key is NaN.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Windows(Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def training_step(self, batch, batch_idx):
        x, padding = batch
        scores = self.query(x) @ self.key(x).transpose(-1, -2) / 6**0.5
        weights = scores.masked_fill(padding[:, :, None], float("-inf")).softmax(dim=-1)  # here
        return (weights @ self.value(x)).pow(2).mean()


def program(seed):
    data = [(torch.randn(3, 4, 6), torch.zeros(3, 4, dtype=torch.bool)) for _ in range(24)]
    small = draw(seed, 8)
    data[8 + small][1][2] = True
    expected = Expected("forward", "", __file__, samples=[small], cause="masked_attention")
    return Program(Windows(), loader(data), expected)
