"""LARS by hand: the step is |weight| / |gradient| of each tensor, and one gradient is all zeros."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class LARS(torch.optim.Optimizer):
    def __init__(self, parameters, lr=0.1, trust=1e-3):
        super().__init__(parameters, {"lr": lr, "trust": trust})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                ratio = group["trust"] * p.norm() / p.grad.norm()  # here
                p.add_(p.grad * ratio, alpha=-group["lr"])
        return loss


class Gated(nn.Module):
    def __init__(self, width, shut):
        super().__init__()
        self.linear = nn.Linear(width, width)
        if shut:
            nn.init.constant_(self.linear.bias, -1e3)

    def forward(self, x):
        return x + torch.relu(self.linear(x))


class Classifier(pl.LightningModule):
    def __init__(self, width=8, shut=0):
        super().__init__()
        self.save_hyperparameters()
        self.blocks = nn.ModuleList(Gated(width, i == shut) for i in range(3))
        self.head = nn.Linear(width, 3)

    def training_step(self, batch, batch_idx):
        x, label = batch
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x), label)

    def configure_optimizers(self):
        return LARS(self.parameters(), lr=0.1)


def program(seed):
    shut = draw(seed, 3)
    data = [(torch.randn(8), torch.tensor(i % 3)) for i in range(16)]
    name = f"blocks.{shut}.linear"
    expected = Expected("optimizer", name, __file__, tensor=f"{name}.weight", cause="optimizer_update")
    return Program(Classifier(shut=shut), loader(data), expected)
