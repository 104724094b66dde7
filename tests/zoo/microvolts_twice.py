"""Signals are in microvolts already, and the first layer of the net, made for volts, multiplies them by a million."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader


class ToMicrovolts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("unit", torch.tensor(1e6))

    def forward(self, signal):
        return signal * self.unit


class SleepStage(pl.LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(
            ToMicrovolts(),
            nn.Conv1d(2, width, 5, stride=2),
            nn.GroupNorm(2, width),
            nn.SiLU(),
            nn.Conv1d(width, width, 5, stride=2),
        )
        self.stage = nn.Linear(width, 5)

    def forward(self, signal):
        return self.stage(self.encoder(signal).mean(dim=2))  # here

    def training_step(self, batch, batch_idx):
        logits = self(batch["signal"])
        return nn.functional.cross_entropy(logits, batch["stage"])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def program(seed):
    data = [{"signal": 3 * torch.randn(2, 40), "stage": torch.tensor(i % 5)} for i in range(16)]
    expected = Expected("forward", "encoder.1", __file__, cause="input_scale", cause_module="encoder.0")
    return Program(SleepStage(8 + 2 * draw(seed, 4)), loader(data), expected, precision="16-mixed")
