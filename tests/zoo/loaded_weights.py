"""A backbone is loaded from a file that was averaged from a run that had diverged: one weight of it is NaN."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block(x))  # here
        return x


class FineTuned(Module):
    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        return self.head(self.backbone(batch)).pow(2).mean()


def program(seed):
    place = draw(seed, 4)
    published = Backbone().state_dict()
    published[f"blocks.{place}.weight"][draw(seed + 1, 8), 2] = float("nan")
    module = FineTuned()
    module.backbone.load_state_dict(published)
    expected = Expected(
        "weights",
        f"backbone.blocks.{place}",
        __file__,
        tensor=f"backbone.blocks.{place}.weight",
        cause="nonfinite_weights",
    )
    return Program(module, loader(list(torch.randn(16, 8))), expected)
