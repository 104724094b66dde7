"""Evidential classification without the `+ 1`: the evidence of a class is a ReLU, and lgamma(0) is infinite."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader, mlp


class DirichletLoss(nn.Module):
    def forward(self, evidence, label):
        total = evidence.sum(dim=1)
        prior = torch.lgamma(total) - torch.lgamma(evidence).sum(dim=1)  # here
        wanted = evidence.gather(1, label.unsqueeze(1)).squeeze(1)
        return (torch.digamma(total) - torch.digamma(wanted + 1)).mean() + 1e-2 * prior.mean()


class Evidential(pl.LightningModule):
    def __init__(self, classes=4):
        super().__init__()
        self.save_hyperparameters()
        self.net = mlp(6, 16, classes)
        self.criterion = DirichletLoss()
        nn.init.constant_(self.net[2].bias, 3.0)

    def training_step(self, batch, batch_idx):
        features, label = batch
        return self.criterion(torch.relu(self.net(features)), label)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def program(seed):
    module = Evidential()
    module.net[2].bias.data[draw(seed, 4)] = -4.0
    data = [(torch.randn(6), torch.tensor(i % 4)) for i in range(16)]
    return Program(module, loader(data), Expected("forward", "criterion", __file__, cause="undefined_operation"))
