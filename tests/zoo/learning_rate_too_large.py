"""Linear regression with a learning rate far above 2 / curvature: each step overshoots further, until fp32 ends."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

LR = 5.0


class Regression(Module):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.linear = nn.Linear(width, 1)

    def training_step(self, batch, batch_idx):
        features, target = batch
        return nn.functional.mse_loss(self.linear(features).squeeze(1), target)  # here

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR)


def program(seed):
    width = 8 + draw(seed, 8)
    data = [(torch.randn(width), torch.randn(())) for _ in range(480)]
    expected = Expected("forward", "", __file__, cause="divergence", cause_tensor="linear.weight")
    return Program(Regression(width), loader(data), expected)
