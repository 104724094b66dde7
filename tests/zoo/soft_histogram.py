"""Histograms are compared by their roots (Hellinger); a bin that no value reaches is 0, and has no slope there."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader


class Histogram(nn.Module):
    def __init__(self, bins=8, low=-9.0, high=9.0):
        super().__init__()
        self.register_buffer("centres", torch.linspace(low, high, bins))
        self.width = 0.2 * (high - low) / (bins - 1)

    def forward(self, x):
        near = torch.exp(-0.5 * ((x.unsqueeze(-1) - self.centres) / self.width) ** 2)
        return near.sum(dim=1) / x.shape[1]


class ColourTransfer(pl.LightningModule):
    def __init__(self, bins=8):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Conv1d(1, 6, 1), nn.Tanh(), nn.Conv1d(6, 1, 1))
        self.histogram = Histogram(bins)

    def training_step(self, batch, batch_idx):
        pixels, wanted = batch
        found = self.histogram(self.net(pixels.unsqueeze(1)).squeeze(1))
        hellinger = (found**0.5 - wanted**0.5).pow(2).sum(dim=1)  # here
        return hellinger.mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def program(seed):
    bins = 8 + draw(seed, 6)
    data = [(torch.randn(50), torch.softmax(torch.randn(bins), dim=0)) for _ in range(16)]
    expected = Expected("backward", "", __file__, cause="undefined_gradient")
    return Program(ColourTransfer(bins), loader(data), expected)
