"""Centred RMSprop takes the root of E[g^2] - E[g]^2; the gradient is the same in every step, and that falls below 0."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Critic(Module):
    """A linear critic, whose gradient is the difference of the means, whatever its weights are."""

    def __init__(self, width=4):
        super().__init__()
        self.save_hyperparameters()
        self.score = nn.Linear(width, 3)

    def training_step(self, batch, batch_idx):
        real, made = batch
        return self.score(made).mean() - self.score(real).mean() + self.score(real).sum(dim=1).mean()

    def configure_optimizers(self):
        return torch.optim.RMSprop(self.parameters(), lr=1e-5, alpha=0.5, centered=True)  # here


def program(seed):
    width = 20 + draw(seed, 20)
    pair = (torch.randn(width), torch.randn(width))
    expected = Expected("optimizer", "score", __file__, cause="optimizer_update", option="centered")
    return Program(Critic(width), loader([pair] * 160, 2), expected)
