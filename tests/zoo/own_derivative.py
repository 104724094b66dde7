"""An autograd function whose hand-written backward divides by what may be 0."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader


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
        self.net = nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 1, bias=False))

    def training_step(self, batch, batch_idx):
        return SoftAbsolute.apply(self.net(batch)).mean()


def program(seed):
    data = torch.randn(24, 5)
    silent = draw(seed, 8)
    data[8 + silent] = 0.0
    expected = Expected("backward", "", __file__, samples=[silent], cause="undefined_gradient")
    return Program(Sparse(), loader(list(data)), expected)
