"""A signed square root by `where`: the root of the negative ones is NaN and thrown away, its derivative is not."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class SignedRoot(nn.Module):
    def forward(self, x):
        return torch.where(x > 0, x.sqrt(), -((-x).clamp(min=1e-6)).sqrt())  # here


class Forecast(pl.LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.lstm = nn.LSTM(1, width, batch_first=True)
        self.head = nn.Linear(width, 1)
        self.root = SignedRoot()

    def training_step(self, batch, batch_idx):
        past, future = batch
        states, _ = self.lstm(past)
        return nn.functional.mse_loss(self.root(self.head(states[:, -1])).squeeze(1), future)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def program(seed):
    module = Forecast(width=6 + draw(seed, 8))
    module.head.bias.data.fill_(-1.0)
    data = [(torch.randn(9, 1), torch.randn(())) for _ in range(24)]
    expected = Expected("backward", "root", __file__, cause="undefined_gradient")
    return Program(module, loader(data), expected)
