"""Causal attention over texts that are padded on the left: the first words of a short text see nothing at all."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class CausalAttention(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, there):
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5
        seen = torch.ones(length, length, dtype=torch.bool).tril() & there[:, None, None, :]
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)  # here
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), CausalAttention(width)

    def forward(self, x, there):
        return x + self.attention(self.norm(x), there)


class Writer(pl.LightningModule):
    def __init__(self, words=15, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Embedding(words, width, padding_idx=0)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, words)

    def training_step(self, text, batch_idx):
        x, there = self.embed(text[:, :-1]), text[:, :-1] != 0
        for block in self.blocks:
            x = block(x, there)
        return nn.functional.cross_entropy(self.head(x).transpose(1, 2), text[:, 1:], ignore_index=0)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def program(seed):
    text = torch.randint(1, 15, (24, 8))
    short = draw(seed, 8)
    text[8 + short, :3] = 0
    expected = Expected("forward", "blocks.0.attention", __file__, samples=[short], cause="masked_attention")
    return Program(Writer(), loader(list(text)), expected, precision="bf16-mixed")
