"""An autoencoder in pure fp16 whose loss is the sum over the pixels of the batch, as the paper's formula has it."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class Autoencoder(pl.LightningModule):
    def __init__(self, code=8):
        super().__init__()
        self.save_hyperparameters()
        self.encode = nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, code), nn.ReLU())
        self.decode = nn.Linear(code, 3 * 24 * 24)

    def forward(self, picture):
        return self.decode(self.encode(picture)).reshape(picture.shape)

    def training_step(self, picture, batch_idx):
        error = self(picture) - picture
        return (error * error).sum()  # here

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def program(seed):
    data = list(1.6 * torch.randn(64, 3, 24, 24))
    expected = Expected("forward", "", __file__, cause="fp16_overflow")
    return Program(Autoencoder(code=4 + draw(seed, 8)), loader(data, 32), expected, precision="16-true")
