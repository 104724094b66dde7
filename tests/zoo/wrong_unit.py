"""House prices; one was entered in another currency, 1e22 times too large, and its squared error leaves fp32."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class Prices(pl.LightningModule):
    def __init__(self, width=16):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 1))

    def training_step(self, batch, batch_idx):
        house, price = batch
        loss = nn.functional.mse_loss(self.net(house).squeeze(1), price)  # here
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3, nesterov=True, momentum=0.9)


def program(seed):
    price = 1 + torch.rand(32)
    wrong = draw(seed, 8)
    price[8 + wrong] *= 1e22
    data = list(zip(torch.randn(32, 6), price, strict=True))
    expected = Expected("forward", "", __file__, cause="extreme_sample", cause_tensor="batch[1]", cause_samples=[wrong])
    return Program(Prices(), loader(data), expected)
