"""A convolution is drawn with a deviation of 1e6; six blocks later nothing fits fp32 any more."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.conv(x))  # here


class Plain(pl.LightningModule):
    def __init__(self, width=6, depth=6):
        super().__init__()
        self.save_hyperparameters()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, 2)
        for module in self.blocks.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=1e6)

    def training_step(self, batch, batch_idx):
        picture, label = batch
        return nn.functional.cross_entropy(self.head(self.blocks(picture).mean(dim=(2, 3))), label)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def program(seed):
    width = 4 + draw(seed, 4)
    data = [(torch.randn(width, 8, 8), torch.tensor(i % 2)) for i in range(16)]
    tensors = tuple(f"blocks.{i}.conv.weight" for i in range(6))
    expected = Expected("forward", "blocks.5.conv", __file__, cause="extreme_weights", cause_tensor=tensors)
    return Program(Plain(width), loader(data), expected)
