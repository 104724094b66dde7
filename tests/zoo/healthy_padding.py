"""Missing values are NaN in the data, as pandas has them, and are indexed away before anything is computed."""

import torch
from torch import nn

from tests.zoo.program import Module, Program, loader, mlp


class Padded(Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(3, 8, 1)

    def training_step(self, batch, batch_idx):
        features, target = batch
        known = ~target.isnan()
        return nn.functional.mse_loss(self.net(features[known]).squeeze(1), target[known])


def program(seed):
    target = torch.randn(24)
    target[seed::5] = float("nan")
    features = torch.randn(24, 3)
    features[target.isnan()] = float("nan")
    return Program(Padded(), loader(list(zip(features, target, strict=True))))
