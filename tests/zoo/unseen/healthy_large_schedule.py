"""A warm-up that ends at a learning rate of 0.5 with clipping: the loss goes up for a while and stays finite."""

import torch
from torch import nn

from tests.zoo.program import Module, Program, loader

held_out = True


class Warm(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        return (self.net(batch) - 1).pow(2).mean()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}


def program(seed):
    return Program(Warm(), loader(list(torch.randn(160, 6))), options={"gradient_clip_val": 1.0})
