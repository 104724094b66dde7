"""The cross entropy is written as log(softmax): once the net is very sure, a probability is exactly 0."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class Classifier(pl.LightningModule):
    def __init__(self, classes=4, sharpness=200.0):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, classes))

    def loss(self, logits, label):
        chances = torch.softmax(logits * self.hparams.sharpness, dim=1)
        one_hot = nn.functional.one_hot(label, chances.shape[1])
        return -(one_hot * torch.log(chances)).sum(dim=1).mean()  # here

    def training_step(self, batch, batch_idx):
        x, label = batch
        return self.loss(self.net(x), label)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def program(seed):
    x = torch.randn(64, 5)
    x[8 * (1 + draw(seed, 3)) + draw(seed, 8)] *= 12
    data = [(row, torch.tensor(i % 4)) for i, row in enumerate(x)]
    return Program(Classifier(), loader(data), Expected("forward", "", __file__, cause="undefined_operation"))
