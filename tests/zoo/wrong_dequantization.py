"""Weights of 8 bits were multiplied by the reciprocal of their scale; the net's answer, squared, leaves fp32."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(torch.tanh(x))


class Quantized(Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(8) for _ in range(4))
        self.head = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        x, target = batch
        for block in self.blocks:
            x = block(x)
        return nn.functional.mse_loss(self.head(x).squeeze(1), target)  # here


def program(seed):
    place, scale = draw(seed, 4), 1e-19
    module = Quantized()
    whole = torch.randint(-127, 128, (8, 8), dtype=torch.int8)
    module.blocks[place].linear.weight.data = whole / scale
    data = list(zip(torch.randn(16, 8), torch.randn(16), strict=True))
    expected = Expected("forward", "", __file__, cause="extreme_weights", cause_tensor=f"blocks.{place}.linear.weight")
    return Program(module, loader(data), expected)
