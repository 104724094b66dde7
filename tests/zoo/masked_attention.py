"""Attention written by hand: one sequence is nothing but padding, and softmax over -inf alone is NaN."""

import math

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, padding):
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(padding[:, None, None, :], -math.inf)
        weights = scores.softmax(dim=-1)  # here
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, 2)

    def forward(self, x, padding):
        return x + self.attention(self.norm(x), padding)


class TextClassifier(Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.blocks = nn.ModuleList(Block(8) for _ in range(2))
        self.head = nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        tokens, label = batch
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, tokens == 0)
        return nn.functional.cross_entropy(self.head(x.mean(dim=1)), label)


def program(seed):
    tokens = torch.randint(1, 20, (24, 5))
    tokens[::3, 3:] = 0
    empty = draw(seed, 8)
    tokens[8 + empty] = 0
    data = [(line, torch.tensor(1)) for line in tokens]
    expected = Expected("forward", "blocks.0.attention", __file__, samples=[empty], cause="masked_attention")
    return Program(TextClassifier(), loader(data), expected)
