"""Position embeddings are made with `torch.empty` and never filled: whatever was in that memory is their value."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # here
        return x + scores.softmax(dim=-1) @ v


class Language(Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(12, 8)
        self.position = nn.Parameter(torch.empty(6, 8))
        self.attention = Attention(8)
        self.head = nn.Linear(8, 12)

    def training_step(self, tokens, batch_idx):
        x = self.attention(self.words(tokens) + self.position)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten())


def program(seed):
    module = Language()
    nn.init.zeros_(module.position)  # a memory that is the same in every test
    module.position.data[draw(seed, 6), 3] = 4.6e27
    data = list(torch.randint(12, (24, 6)))
    expected = Expected("forward", "attention", __file__, cause="extreme_weights", cause_tensor="position")
    return Program(module, loader(data), expected)
