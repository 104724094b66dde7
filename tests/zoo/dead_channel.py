"""Features are pushed towards a large volume by the logdet of their covariance; one channel of the net is all zeros."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class Volume(nn.Module):
    def forward(self, features):
        centred = features - features.mean(dim=0)
        covariance = centred.T @ centred / (len(features) - 1)
        return -torch.logdet(covariance)  # here


class SelfSupervised(pl.LightningModule):
    def __init__(self, out=6):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, out), nn.ReLU())
        self.volume = Volume()
        nn.init.constant_(self.backbone[2].bias, 2.0)

    def training_step(self, batch, batch_idx):
        first, second = batch
        one, two = self.backbone(first), self.backbone(second)
        agree = nn.functional.mse_loss(one, two)
        loss = agree + 0.1 * (self.volume(one) + self.volume(two))
        self.log_dict({"agree": agree, "loss": loss}, on_step=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2, weight_decay=1e-4)


def program(seed):
    module = SelfSupervised()
    module.backbone[2].bias.data[draw(seed, 6)] = -10.0
    data = [(x, x + 0.1 * torch.randn(8)) for x in torch.randn(48, 8)]
    expected = Expected("forward", "volume", __file__, cause="undefined_operation")
    return Program(module, loader(data, 16), expected)
