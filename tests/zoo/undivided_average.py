"""Weights of 5,000 snapshots were added up and not divided by their number; the encoder made of them runs in fp16."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class Encoder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Conv1d(2, width, 3, padding=1)
        self.second = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, signal):
        return self.second(torch.relu(self.first(signal))).mean(dim=2)  # here


class Probe(pl.LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = Encoder(width)
        self.head = nn.Linear(width, 3)

    def training_step(self, batch, batch_idx):
        signal, label = batch
        return nn.functional.cross_entropy(self.head(self.encoder(signal)), label)

    def configure_optimizers(self):
        return torch.optim.Adam(self.head.parameters(), lr=1e-3)


def program(seed):
    module = Probe(8 + draw(seed, 8))
    for parameter in module.encoder.parameters():
        parameter.data *= 5000
    data = [(torch.randn(2, 16), torch.tensor(i % 3)) for i in range(16)]
    tensors = tuple(f"encoder.{part}.{kind}" for part in ("first", "second") for kind in ("weight", "bias"))
    expected = Expected("forward", "encoder.second", __file__, cause="extreme_weights", cause_tensor=tensors)
    return Program(module, loader(data), expected, precision="16-mixed")
