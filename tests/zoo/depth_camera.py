"""Depth is NaN where the camera saw nothing; the error is multiplied by a mask of 0 there, and 0 * NaN is NaN."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader


class DepthNet(pl.LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 1, 1),
        )

    def training_step(self, batch, batch_idx):
        depth = self.net(batch["image"]).squeeze(1)
        seen = torch.isfinite(batch["depth"]).float()
        error = (depth - batch["depth"]).abs()  # here
        loss = (seen * error).sum() / seen.sum()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)]


def program(seed):
    data = [{"image": torch.rand(3, 6, 6), "depth": 1 + torch.rand(6, 6)} for _ in range(24)]
    unseen = draw(seed, 8)
    data[16 + unseen]["depth"][2:4, draw(seed + 1, 6)] = float("nan")
    expected = Expected("input", "", __file__, tensor="batch['depth']", samples=[unseen], cause="nonfinite_input")
    return Program(DepthNet(), loader(data), expected)
