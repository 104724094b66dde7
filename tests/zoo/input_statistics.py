"""The crash report: signals of unit variance are normalised with another corpus's statistics; fp16 overflows."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader


class Normalize(nn.Module):
    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, signal):
        return (signal - self.mean) / self.std


class Encoder(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.patch = nn.Conv1d(channels, 16, 16, stride=8)
        self.norm = nn.GroupNorm(4, 16)

    def forward(self, signal):
        return self.norm(self.patch(signal)).mean(dim=-1)  # here


class Probe(Module):
    def __init__(self, channels=4, std=2.124e-05):
        super().__init__()
        self.save_hyperparameters()
        self.normalize = Normalize(9.4e-09, std)
        self.encoder = Encoder(channels)
        self.head = nn.Linear(16, 2)

    def training_step(self, batch, batch_idx):
        signal, label = batch
        return nn.functional.cross_entropy(self.head(self.encoder(self.normalize(signal))), label)


def program(seed):
    data = [(torch.randn(4, 64), torch.tensor(draw(seed + i, 2))) for i in range(16)]
    expected = Expected("forward", "encoder.patch", __file__, cause="input_scale", cause_module="normalize")
    return Program(Probe(), loader(data), expected, precision="16-mixed")
