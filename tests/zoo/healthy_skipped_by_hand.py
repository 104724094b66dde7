"""The user looks for NaN himself: a batch whose loss is NaN gives no loss to Lightning, and nothing is updated."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Program, draw, loader

held_out = True


class Careful(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        features, target = batch
        loss = nn.functional.mse_loss(self.net(features).squeeze(1), target)
        return loss if torch.isfinite(loss) else None

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def program(seed):
    target = torch.randn(32)
    target[8 + draw(seed, 8)] = float("nan")
    return Program(Careful(), loader(list(zip(torch.randn(32, 5), target, strict=True))))
