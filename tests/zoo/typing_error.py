"""Visits are counted with a Poisson regression; one age was typed as 4200000, and the exponential of it is infinite."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Rate(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, person):
        return self.linear(person).squeeze(1).exp()  # here


class Visits(Module):
    def __init__(self):
        super().__init__()
        self.rate = Rate()

    def training_step(self, batch, batch_idx):
        person, visits = batch
        rate = self.rate(person)
        return (rate - visits * torch.log(rate + 1e-8)).mean()


def program(seed):
    module = Visits()
    nn.init.constant_(module.rate.linear.weight, 0.1)
    person = torch.randn(24, 3)
    wrong = draw(seed, 8)
    person[16 + wrong, 1] = 42000.0
    data = list(zip(person, torch.randint(5, (24,)).float(), strict=True))
    expected = Expected("forward", "rate", __file__, samples=[wrong], cause="extreme_sample", cause_tensor="batch[0]")
    return Program(module, loader(data), expected)
