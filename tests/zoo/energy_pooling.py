"""The energy of 4,096 features of size 5 is 100,000: each number is sound, and their sum of squares leaves fp16."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class Energy(nn.Module):
    def forward(self, x):
        return (x * x).sum(dim=-1)  # here


class Wide(pl.LightningModule):
    def __init__(self, features=4096, classes=3):
        super().__init__()
        self.save_hyperparameters()
        self.features = nn.Linear(4, features)
        nn.init.normal_(self.features.weight, std=3.0)
        self.energy = Energy()
        self.head = nn.Linear(2, classes)

    def training_step(self, batch, batch_idx):
        x, label = batch
        energy = self.energy(self.features(x).half())
        return nn.functional.cross_entropy(self.head(torch.stack([energy, energy.sqrt()], dim=1) / 1e5), label)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-4)


def program(seed):
    data = [(torch.randn(4), torch.tensor(i % 3)) for i in range(32)]
    module = Wide(features=4096 + 512 * draw(seed, 4))
    return Program(module, loader(data, 16), Expected("forward", "energy", __file__, cause="fp16_overflow"), "16-mixed")
