"""A Weibull model of lifetimes takes log(t); one device was dead on arrival, t = 0.

A lifetime of 0 is a sane value, the logarithm is what cannot take it.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Weibull(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        x, time = batch
        shape, scale = nn.functional.softplus(self.net(x)).unbind(dim=1)
        log_time = torch.log(time)  # here
        return (
            ((log_time - scale.log()) * shape).exp() - torch.log(shape / scale) - (shape - 1) * (log_time - scale.log())
        ).mean()


def program(seed):
    data = [(torch.randn(6), 0.5 + torch.rand(())) for _ in range(24)]
    dead = draw(seed, 8)
    data[8 + dead] = (data[8 + dead][0], torch.tensor(0.0))
    expected = Expected("forward", "", __file__, samples=[dead], cause="undefined_operation")
    return Program(Weibull(), loader(data), expected)
