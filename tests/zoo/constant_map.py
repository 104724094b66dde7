"""Attention maps are stretched to 0 ... 1 by their own minimum and maximum; one of them is constant."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class Stretch(nn.Module):
    def forward(self, maps):
        low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
        return (maps - low) / (high - low)  # here


class Saliency(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.stretch = Stretch()

    def training_step(self, batch, batch_idx):
        picture, gaze = batch
        saliency = self.stretch(torch.relu(self.conv(picture)).mean(dim=1))
        return nn.functional.l1_loss(saliency, gaze)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def program(seed):
    data = [(torch.randn(1, 8, 8), torch.rand(6, 6)) for _ in range(24)]
    black = draw(seed, 8)
    data[8 + black][0].zero_()
    expected = Expected("forward", "stretch", __file__, samples=[black], cause="undefined_operation")
    return Program(Saliency(), loader(data), expected)
