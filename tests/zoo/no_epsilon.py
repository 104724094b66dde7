"""Adam with eps=0: a weight behind a dead unit never gets a gradient, and its update is 0 / 0."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader


class DeadUnit(Module):
    def __init__(self, dead=0):
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        nn.init.constant_(self.layers[dead].bias, 5.0)
        with torch.no_grad():
            self.layers[dead].bias[2] = -100.0

    def training_step(self, batch, batch_idx):
        for layer in self.layers:
            batch = torch.relu(layer(batch)) + 0.1
        return batch.mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-4, eps=0.0)  # here


def program(seed):
    dead = draw(seed, 3)
    module = DeadUnit(dead)
    for layer in module.layers:  # no other unit is ever off
        nn.init.uniform_(layer.weight)
    data = list(torch.rand(16, 6))
    expected = Expected(
        "optimizer", f"layers.{dead}", __file__, tensor=f"layers.{dead}.weight", cause="optimizer_update", option="eps"
    )
    return Program(module, loader(data), expected)
