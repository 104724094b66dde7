"""The net was made for pressure in hPa around its mean; the new files have Pascal, and the first layer leaves fp16."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader, mlp

held_out = True


class Downscaler(pl.LightningModule):
    def __init__(self, levels=6):
        super().__init__()
        self.save_hyperparameters()
        self.of_pressure = nn.Linear(levels, 16)
        self.of_wind = nn.Linear(2, 16)
        self.net = mlp(16, 16, 1)
        nn.init.constant_(self.of_pressure.weight, 1 / levels)

    def training_step(self, batch, batch_idx):
        air = self.of_pressure(batch["pressure"])  # here
        hidden = torch.relu(air + self.of_wind(batch["wind"]))
        loss = nn.functional.mse_loss(self.net(hidden).squeeze(1), batch["rain"])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.RAdam(self.parameters(), lr=1e-3)


def program(seed):
    levels = 4 + draw(seed, 6)
    data = [
        {"pressure": 101_325 + 800 * torch.randn(levels), "wind": torch.randn(2), "rain": torch.rand(())}
        for _ in range(24)
    ]
    expected = Expected("forward", "of_pressure", __file__, cause="input_scale", cause_tensor="batch['pressure']")
    return Program(Downscaler(levels), loader(data), expected, precision="16-mixed")
