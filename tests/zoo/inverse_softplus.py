"""Waiting times go through the inverse of softplus, `log(exp(t) - 1)`; nobody had to wait in one of the rows."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader, mlp

held_out = True


class InverseSoftplus(nn.Module):
    def forward(self, t):
        return torch.log(torch.expm1(t))  # here


class Flow(Module):
    """The likelihood of waiting times under a normal distribution of the transformed ones."""

    def __init__(self):
        super().__init__()
        self.transform = InverseSoftplus()
        self.parameters_of = mlp(3, 12, 2)

    def training_step(self, batch, batch_idx):
        features, time = batch
        mean, log_std = self.parameters_of(features).unbind(dim=1)
        z = (self.transform(time) - mean) * torch.exp(-log_std)
        return (0.5 * z.pow(2) + log_std).mean()


def program(seed):
    time = 0.1 + torch.rand(24)
    served = draw(seed, 8)
    time[8 + served] = 0.0
    data = list(zip(torch.randn(24, 3), time, strict=True))
    expected = Expected("forward", "transform", __file__, samples=[served], cause="undefined_operation")
    return Program(Flow(), loader(data), expected)
