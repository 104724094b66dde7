"""Sessions as rows of numbers; one duration is infinite, since its end was never written."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class Churn(pl.LightningModule):
    def __init__(self, columns=5):
        super().__init__()
        self.save_hyperparameters()
        self.scale = nn.BatchNorm1d(columns)
        self.net = nn.Sequential(nn.Linear(columns, 16), nn.SELU(), nn.Linear(16, 1))

    def forward(self, rows):
        return self.net(self.scale(rows)).squeeze(1)  # here

    def training_step(self, batch, batch_idx):
        stays = self(batch["rows"])
        return nn.functional.binary_cross_entropy_with_logits(stays, batch["left"])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def program(seed):
    rows = torch.randn(32, 5).abs()
    endless = draw(seed, 8)
    rows[16 + endless, draw(seed + 1, 5)] = float("inf")
    data = [{"rows": row, "left": torch.tensor(float(i % 2))} for i, row in enumerate(rows)]
    expected = Expected("input", "scale", __file__, tensor="batch['rows']", samples=[endless], cause="nonfinite_input")
    return Program(Churn(), loader(data), expected)
