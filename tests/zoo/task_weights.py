"""Tasks are weighted by learned log variances; one task is solved exactly, and its log variance falls without end."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class Uncertainty(nn.Module):
    def __init__(self, tasks):
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(tasks))

    def forward(self, losses):
        return (torch.exp(-self.log_variance) * losses + self.log_variance).sum()  # here


class MultiTask(pl.LightningModule):
    def __init__(self, solved=0):
        super().__init__()
        self.save_hyperparameters()
        self.trunk = nn.Linear(6, 12)
        self.heads = nn.ModuleList(nn.Linear(12, 1) for _ in range(3))
        self.weigh = Uncertainty(3)
        nn.init.zeros_(self.heads[solved].weight)
        nn.init.zeros_(self.heads[solved].bias)

    def training_step(self, batch, batch_idx):
        x, targets = batch
        hidden = torch.tanh(self.trunk(x))
        errors = [nn.functional.mse_loss(h(hidden).squeeze(1), t) for h, t in zip(self.heads, targets.T, strict=True)]
        return self.weigh(torch.stack(errors))

    def configure_optimizers(self):
        return torch.optim.SGD(
            [
                {"params": [*self.trunk.parameters(), *self.heads.parameters()], "lr": 0.01},
                {"params": self.weigh.parameters(), "lr": 0.5},
            ]
        )


def program(seed):
    solved = draw(seed, 3)
    targets = 3 * torch.randn(1600, 3)
    targets[:, solved] = 0.0
    data = list(zip(torch.randn(1600, 6), targets, strict=True))
    expected = Expected("forward", "weigh", __file__, cause="divergence", cause_tensor="weigh.log_variance")
    return Program(MultiTask(solved), loader(data), expected)
