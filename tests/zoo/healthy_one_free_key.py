"""Causal attention: the first word sees itself alone, every other key is -inf. One free key is enough."""

import math

import torch
from torch import nn

from tests.zoo.program import Module, Program, loader

held_out = True


class Causal(Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        length = batch.shape[1]
        future = torch.full((length, length), -math.inf).triu(1)
        seen, _ = self.attention(batch, batch, batch, attn_mask=future)
        return self.head(seen).pow(2).mean()


def program(seed):
    return Program(Causal(), loader(list(torch.randn(24, 6, 8))))
