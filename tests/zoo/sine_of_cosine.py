"""The sine of a joint's angle is computed from its predicted cosine, which is beyond 1 for some."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class Kinematics(nn.Module):
    def forward(self, cosine):
        sine = torch.sqrt(1 - cosine**2)  # here
        return torch.stack([cosine.cumsum(dim=1), sine.cumsum(dim=1)], dim=-1)


class Arm(pl.LightningModule):
    def __init__(self, joints=3):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, joints))
        self.kinematics = Kinematics()

    def training_step(self, batch, batch_idx):
        command, places = batch
        return nn.functional.mse_loss(self.kinematics(self.net(command)), places)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def program(seed):
    module = Arm()
    module.net[2].bias.data[draw(seed, 3)] = 1.3
    data = [(torch.randn(4), torch.rand(3, 2)) for _ in range(16)]
    return Program(module, loader(data), Expected("forward", "kinematics", __file__, cause="undefined_operation"))
