"""Features are summed over the pixels of soft regions: 65,536 of them, which fp16 cannot add up."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

SIDE = 256


class RegionPooling(nn.Module):
    def forward(self, features, regions):
        area = regions.flatten(2).float().sum(dim=2, keepdim=True)
        total = regions.flatten(2) @ features.flatten(2).transpose(1, 2)  # here
        return total / area


class Segments(Module):
    def __init__(self):
        super().__init__()
        self.features, self.regions = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 3, 1)
        nn.init.constant_(self.features.bias, 2.0)
        nn.init.constant_(self.regions.bias, 2.0)
        self.pool = RegionPooling()
        self.head = nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        features = torch.relu(self.features(batch))
        pooled = self.pool(features, torch.sigmoid(self.regions(batch)))
        return self.head(pooled).pow(2).mean()


def program(seed):
    data = list((0.5 + 0.1 * draw(seed, 3)) * torch.rand(4, 1, SIDE, SIDE))
    expected = Expected("forward", "pool", __file__, cause="fp16_overflow")
    return Program(Segments(), loader(data, 2), expected, precision="16-mixed")
