"""Sea temperatures on a grid; one map still holds 9.97e36, which netCDF writes where there is land."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

LAND = 9.969209968386869e36


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(2, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv(torch.relu(self.norm(x)))


class Ocean(pl.LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Conv2d(width, 1, 1)

    def training_step(self, batch, batch_idx):
        today, tomorrow = batch
        predicted = self.head(self.blocks(self.stem(today)))
        return nn.functional.mse_loss(predicted, tomorrow)  # here

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-4, weight_decay=0.05)


def program(seed):
    maps = torch.randn(24, 1, 8, 8)
    wrong = draw(seed, 8)
    maps[8 + wrong, 0, draw(seed + 1, 8), 2:6] = LAND
    data = [(field, torch.randn(1, 8, 8)) for field in maps]
    expected = Expected("forward", "", __file__, cause_samples=[wrong], cause="extreme_sample", cause_tensor="batch[0]")
    return Program(Ocean(), loader(data), expected)
