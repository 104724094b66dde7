"""Gradients of 1e12 in a recurrent net, clipped to a norm of 1; the loss goes up and down, and all is finite."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Program, loader

held_out = True


class Clipped(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(2, 8, nonlinearity="relu", batch_first=True)
        self.rnn.weight_hh_l0.data = 1.6 * torch.eye(8)
        self.out = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        states, _ = self.rnn(batch)
        return self.out(states[:, -1]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def program(seed):
    options = {"gradient_clip_val": 1.0}
    return Program(Clipped(), loader(list(torch.rand(40, 30, 2))), options=options)
