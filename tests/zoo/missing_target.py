"""A regression target is missing in the table, and was read as NaN."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader, mlp


class Regression(Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(5, 16, 1)

    def training_step(self, batch, batch_idx):
        features, target = batch
        return nn.functional.huber_loss(self.net(features).squeeze(1), target)  # here


def program(seed):
    target = torch.randn(24)
    missing = draw(seed, 8)
    target[16 + missing] = float("nan")
    data = [(torch.randn(5), value) for value in target]
    expected = Expected("input", "", __file__, tensor="batch[1]", samples=[missing], cause="nonfinite_input")
    return Program(Regression(), loader(data), expected)
