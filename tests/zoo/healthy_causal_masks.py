"""A transformer whose masks and buffers are full of -inf, with sequences of different lengths; all is well."""

import math

import torch
from torch import nn

from tests.zoo.program import Module, Program, loader


class Attention(nn.Module):
    def __init__(self, width, length):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.register_buffer("causal", torch.full((length, length), -math.inf).triu(1))

    def forward(self, x, padding):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = q @ k.transpose(-1, -2) + self.causal
        return x + scores.masked_fill(padding[:, None, :], -math.inf).softmax(dim=-1) @ v


class Language(Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(Attention(8, 6) for _ in range(2))
        self.head = nn.Linear(8, 10)

    def training_step(self, tokens, batch_idx):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, tokens == 0)
        return nn.functional.cross_entropy(self.head(x[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def program(seed):
    tokens = torch.randint(1, 10, (24, 6), generator=torch.Generator().manual_seed(seed))
    tokens[::2, 4:] = 0
    return Program(Language(), loader(list(tokens)))
