"""A running mean is divided by 1 - 0.999 ** t; that is computed in bf16, where 0.999 is 1."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader


class RunningMean(nn.Module):
    def __init__(self, width, beta=0.999):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("beta", torch.tensor(beta))
        self.register_buffer("step", torch.tensor(0.0))

    def forward(self, x):
        self.step += 1
        self.mean.copy_(self.beta * self.mean + (1 - self.beta) * x.detach().mean(dim=0))
        return x - self.mean / (1 - self.beta**self.step)  # here


class Student(pl.LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, width))
        self.centre = RunningMean(width)

    def training_step(self, batch, batch_idx):
        x, wanted = batch
        centred = self.centre(self.backbone(x))
        return nn.functional.mse_loss(centred, wanted)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def program(seed):
    width = 6 + draw(seed, 6)
    data = [(torch.randn(6), torch.randn(width)) for _ in range(16)]
    expected = Expected("forward", "centre", __file__, cause="undefined_operation")
    return Program(Student(width), loader(data), expected, precision="bf16-true")
