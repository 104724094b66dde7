"""Radar echoes in fp16; one is in linear units instead of decibel, and the convolution leaves the format."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class Radar(pl.LightningModule):
    def __init__(self, width=6):
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Conv1d(1, width, 5, padding=2)
        self.body = nn.Sequential(nn.BatchNorm1d(width), nn.GELU(), nn.Conv1d(width, width, 3), nn.GELU())
        self.head = nn.Linear(width, 3)

    def forward(self, echo):
        return self.head(self.body(self.stem(echo)).amax(dim=2))  # here

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch["echo"]), batch["kind"])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def program(seed):
    echo = torch.randn(32, 1, 20)
    wrong = draw(seed, 8)
    echo[16 + wrong] = 10 ** (5 + echo[16 + wrong].abs())
    data = [{"echo": e, "kind": torch.tensor(i % 3)} for i, e in enumerate(echo)]
    expected = Expected(
        "forward", "stem", __file__, samples=[wrong], cause="extreme_sample", cause_tensor="batch['echo']"
    )
    return Program(Radar(), loader(data), expected, precision="16-mixed")
