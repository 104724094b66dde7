"""Attention without softmax adds up 2048 keys before it divides by their sum; in fp16 the sums do not fit."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class LinearAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        nn.init.constant_(self.qkv.bias[2 * width :], 1.0)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
        together = k.transpose(-1, -2) @ v
        numerator = q @ together  # here
        return numerator / (q @ k.sum(dim=1).unsqueeze(-1))


class LongDocuments(Module):
    def __init__(self):
        super().__init__()
        self.attention = LinearAttention(64)
        self.head = nn.Linear(64, 2)

    def training_step(self, batch, batch_idx):
        document, label = batch
        return nn.functional.cross_entropy(self.head(self.attention(document).mean(dim=1)), label)


def program(seed):
    length = 2048 + 256 * draw(seed, 3)
    data = [(torch.randn(length, 64), torch.tensor(i % 2)) for i in range(4)]
    expected = Expected("forward", "attention", __file__, cause="fp16_overflow")
    return Program(LongDocuments(), loader(data, 2), expected, precision="16-mixed")
