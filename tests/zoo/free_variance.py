"""Regression with a predicted log variance that nothing bounds; the rate is too high, and exp of it leaves fp32."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class Gaussian(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mean, self.log_variance = nn.Linear(width, 1), nn.Linear(width, 1)

    def nll(self, hidden, target):
        mean, log_variance = self.mean(hidden).squeeze(1), self.log_variance(hidden).squeeze(1)
        return 0.5 * (log_variance + (target - mean).pow(2) * torch.exp(-log_variance)).mean()  # here


class Heteroscedastic(pl.LightningModule):
    def __init__(self, width=16, lr=4.0):
        super().__init__()
        self.save_hyperparameters()
        self.trunk = nn.Sequential(nn.Linear(3, width), nn.Tanh())
        self.gaussian = Gaussian(width)

    def training_step(self, batch, batch_idx):
        x, target = batch
        return self.gaussian.nll(self.trunk(x), target)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


def program(seed):
    data = [(torch.randn(3), 0.1 * torch.randn(())) for _ in range(800)]
    tensors = tuple(f"gaussian.{part}.{kind}" for part in ("mean", "log_variance") for kind in ("weight", "bias"))
    expected = Expected("forward", "gaussian", __file__, cause="divergence", cause_tensor=tensors)
    return Program(Heteroscedastic(width=12 + draw(seed, 8)), loader(data), expected)
