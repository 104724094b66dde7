"""One batch is a million times larger than the others and the loss with it; it is clipped, and training goes on."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Program, draw, loader

held_out = True


class Spiky(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        x, target = batch
        return nn.functional.mse_loss(self.net(x).squeeze(1), target)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def program(seed):
    target = torch.randn(64)
    wild = 8 * (1 + draw(seed, 6))
    target[wild : wild + 8] *= 1e6
    data = list(zip(torch.randn(64, 4), target, strict=True))
    return Program(Spiky(), loader(data), options={"gradient_clip_val": 0.5})
