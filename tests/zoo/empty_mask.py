"""The loss is the mean over the pixels of a mask, and the mask of one batch selects none."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader


class MaskedLoss(nn.Module):
    def forward(self, prediction, target, mask):
        return (prediction - target)[mask].pow(2).mean()  # here


class Depth(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1))
        self.loss = MaskedLoss()

    def training_step(self, batch, batch_idx):
        image, depth, mask = batch
        return self.loss(self.net(image), depth, mask)


def program(seed):
    mask = torch.rand(12, 1, 6, 6) > 0.5
    empty = draw(seed, 3)
    mask[4 * empty : 4 * empty + 4] = False
    data = [(torch.randn(1, 6, 6), torch.randn(1, 6, 6), m) for m in mask]
    expected = Expected("forward", "loss", __file__, cause="empty_reduction")
    return Program(Depth(), loader(data, 4), expected)
