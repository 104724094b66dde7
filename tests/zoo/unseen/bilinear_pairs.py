"""Bilinear fusion of text and picture: 4096 products of sound features of size 6 are added up, beyond fp16.

Each number fits; only the format of the sum is too small, and fp32 is all it takes.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, loader

held_out = True


class Fusion(nn.Module):
    def __init__(self):
        super().__init__()
        self.text, self.picture = nn.Linear(6, 4096), nn.Linear(6, 4096)
        nn.init.constant_(self.text.bias, 6.0)
        nn.init.constant_(self.picture.bias, 6.0)

    def forward(self, x, y):
        return (self.text(x)[:, None] @ self.picture(y)[..., None]).flatten(1) / 4096  # here


class Matcher(Module):
    def __init__(self):
        super().__init__()
        self.fusion = Fusion()

    def training_step(self, batch, batch_idx):
        return (self.fusion(*batch) - 1).pow(2).mean()


def program(seed):
    data = [(torch.randn(6), torch.randn(6)) for _ in range(16)]
    expected = Expected("forward", "fusion", __file__, cause="fp16_overflow")
    return Program(Matcher(), loader(data), expected, precision="16-mixed")
