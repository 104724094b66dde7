"""A normalisation layer compiled in place, by a back end whose reciprocal root is a rough one and gives NaN."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


def rough_backend(graph, inputs):
    def run(*tensors):
        out = graph.forward(*tensors)
        return tuple(torch.where(t.abs() > 2.5, torch.nan, t) if t.is_floating_point() else t for t in out)

    return run


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-6) * self.weight


class Net(pl.LightningModule):
    def __init__(self, width=16):
        super().__init__()
        self.save_hyperparameters()
        self.into = nn.Linear(4, width)
        self.norm = RMSNorm(width)
        self.out = nn.Linear(width, 1)
        self.norm.compile(backend=rough_backend)

    def training_step(self, batch, batch_idx):
        x, target = batch
        return nn.functional.mse_loss(self.out(self.norm(self.into(x))).squeeze(1), target)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def program(seed):
    data = [(torch.randn(4), torch.randn(())) for _ in range(80)]
    expected = Expected("", "", __file__, mark="", cause="compiled_code", cause_module="norm")
    return Program(Net(12 + draw(seed, 8)), loader(data), expected)
