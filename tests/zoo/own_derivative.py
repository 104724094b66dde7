"""An autograd function whose hand-written backward divides by what may be 0."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader, mlp


class SoftAbsolute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.abs()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x / x.abs()  # here


class Sparse(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(mlp(5, 8, 8), nn.ReLU(), nn.Linear(8, 1, bias=False))

    def training_step(self, batch, batch_idx):
        return SoftAbsolute.apply(self.net(batch)).mean()


def program(seed):
    module = Sparse()
    nn.init.constant_(module.net[0][2].bias, 3.0)
    data = torch.randn(24, 5)
    with torch.no_grad():  # the ReLU is off for this sample alone
        nn.init.ones_(module.net[0][2].weight)
        nn.init.eye_(module.net[0][0].weight)
        off = draw(seed, 8)
        module.net[0][2].bias.fill_(3.0)
        data[8 + off] = 0.0
        module.net[0][0].bias.fill_(0.0)
        module.net[2].weight.fill_(1.0)
    module.zero_at = off
    return Program(module, loader(list(data)), Expected("backward", "", __file__))
