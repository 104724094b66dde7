"""The correlation that is logged is 0 / 0 for a batch of equal targets; it is detached, the loss does not see it."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Program, draw, loader

held_out = True


class Scored(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def score(self, predicted, target):
        a, b = predicted - predicted.mean(), target - target.mean()
        return (a * b).sum() / (a.pow(2).sum() * b.pow(2).sum()).sqrt()

    def training_step(self, batch, batch_idx):
        x, target = batch
        predicted = self.net(x).squeeze(1)
        self.log("correlation", self.score(predicted.detach(), target), on_step=True, on_epoch=False)
        return nn.functional.mse_loss(predicted, target)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def program(seed):
    target = torch.randn(32)
    flat = 8 * draw(seed, 4)
    target[flat : flat + 8] = 1.0
    return Program(Scored(), loader(list(zip(torch.randn(32, 4), target, strict=True))))
