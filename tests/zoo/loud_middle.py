"""A layer in the middle of the net multiplies by two million, as somebody once needed it; in fp16."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class Gain(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x  # here


class Audio(pl.LightningModule):
    def __init__(self, width=8, gain=2e6):
        super().__init__()
        self.save_hyperparameters()
        self.front = nn.Sequential(nn.Conv1d(1, width, 7), nn.BatchNorm1d(width), nn.ReLU())
        self.gain = Gain(gain)
        self.back = nn.Sequential(nn.Conv1d(width, width, 5), nn.ReLU())
        self.head = nn.Linear(width, 2)

    def training_step(self, batch, batch_idx):
        sound, label = batch
        loud = self.gain(self.front(sound))
        return nn.functional.cross_entropy(self.head(self.back(loud).mean(dim=2)), label)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-4)


def program(seed):
    data = [(torch.randn(1, 40), torch.tensor(i % 2)) for i in range(16)]
    expected = Expected("forward", "gain", __file__, cause="input_scale", cause_module="gain")
    return Program(Audio(width=6 + draw(seed, 6)), loader(data), expected, precision="16-mixed")
