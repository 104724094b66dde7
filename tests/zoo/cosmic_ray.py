"""Once, a gradient is changed on its way, as memory or a link that fails would do. The loss was fine."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


FAULTS = []


def pass_on(gradient):
    """The gradient; once with an infinity in it."""
    if FAULTS and FAULTS[0] == 0:
        FAULTS.clear()
        return gradient.clone().index_fill_(0, torch.tensor([1]), float("inf"))
    if FAULTS:
        FAULTS[0] -= 1
    return gradient


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3)
        self.head = nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        x, label = batch
        hidden = torch.relu(self.conv(x))
        hidden.register_hook(pass_on)
        return nn.functional.cross_entropy(self.head(hidden.mean(dim=2)), label)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def program(seed):
    FAULTS[:] = [1 + draw(seed, 3)]
    data = [(torch.randn(2, 12), torch.tensor(i % 2)) for i in range(48)]
    return Program(Net(), loader(data), Expected("", "", __file__, mark="", cause="transient"))
