"""A physical constraint is weighted by a million: the loss is fine in fp32, its gradient fits fp16 at no scale."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader


class Surrogate(pl.LightningModule):
    def __init__(self, width=16, penalty=2e6):
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.flow = nn.Linear(width, 2)

    def training_step(self, batch, batch_idx):
        place, flow, outlet = batch
        predicted = self.flow(self.body(place))
        lost = nn.functional.mse_loss(predicted.sum(dim=1), outlet)  # here
        return nn.functional.mse_loss(predicted, flow) + self.hparams.penalty * lost

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-4)


def program(seed):
    data = [(torch.rand(3), torch.rand(2), 1 + torch.rand(())) for _ in range(160)]
    module = Surrogate(width=12 + draw(seed, 8))
    expected = Expected("backward", "", __file__, cause="fp16_overflow")
    return Program(module, loader(data), expected, precision="16-mixed", loss_scale=16.0)
