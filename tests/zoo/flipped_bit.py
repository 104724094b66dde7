"""Once, in one run, a bit of the exponent of an activation flips in memory. It never happens again."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True
FAULTS = []


class Memory(nn.Module):
    """Where the bit flips, if there is one to flip."""

    def forward(self, x):
        if FAULTS and FAULTS[0] == 0:
            FAULTS.clear()
            bits = x.detach().clone().view(torch.int32)
            bits[0, 0] |= 0x7F800000
            return x + (bits.view(torch.float32) - x.detach())
        if FAULTS:
            FAULTS[0] -= 1
        return x


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), Memory(), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        x, label = batch
        return nn.functional.cross_entropy(self.net(x), label)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def program(seed):
    FAULTS[:] = [1 + draw(seed, 3)]
    data = [(torch.randn(6), torch.tensor(i % 2)) for i in range(48)]
    return Program(Net(), loader(data), Expected("", "", __file__, mark="", cause="transient"))
