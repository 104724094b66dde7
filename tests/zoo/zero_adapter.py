"""An adapter starts at zero and its length is penalised: the root of a sum of squares has no slope at 0."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class Adapter(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.down = nn.Linear(width, 4)
        self.up = nn.Linear(4, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return x + self.up(torch.relu(self.down(x)))

    def length(self):
        return (self.up.weight**2).sum().sqrt()  # here


class Adapted(pl.LightningModule):
    def __init__(self, width=8, penalty=1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Linear(6, width).requires_grad_(False)
        self.adapter = Adapter(width)
        self.head = nn.Linear(width, 2)

    def training_step(self, batch, batch_idx):
        x, label = batch
        task = nn.functional.cross_entropy(self.head(self.adapter(self.backbone(x))), label)
        return task + self.hparams.penalty * self.adapter.length()

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def program(seed):
    data = [(torch.randn(6), torch.tensor(i % 2)) for i in range(16)]
    module = Adapted(width=6 + draw(seed, 8))
    return Program(module, loader(data), Expected("backward", "adapter", __file__, cause="undefined_gradient"))
