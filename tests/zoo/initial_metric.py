"""A learned metric starts as the identity, whose eigenvalues are all equal; `eigh` divides by their differences."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class Metric(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.factor = nn.Parameter(torch.eye(width))

    def root(self):
        values, vectors = torch.linalg.eigh(self.factor @ self.factor.T)  # here
        return vectors @ torch.diag(values.sqrt()) @ vectors.T

    def forward(self, x):
        return x @ self.root()


class Prototypes(pl.LightningModule):
    def __init__(self, width=5, classes=3):
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Linear(8, width)
        self.metric = Metric(width)
        self.prototypes = nn.Parameter(torch.randn(classes, width))

    def training_step(self, batch, batch_idx):
        x, label = batch
        apart = self.metric(self.embed(x)).unsqueeze(1) - self.metric(self.prototypes)
        return nn.functional.cross_entropy(-apart.pow(2).sum(dim=2), label)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def program(seed):
    data = [(torch.randn(8), torch.tensor(i % 3)) for i in range(16)]
    expected = Expected("backward", "metric", __file__, cause="undefined_gradient")
    return Program(Prototypes(width=3 + draw(seed, 5)), loader(data), expected)
