"""A Matern kernel over learned features: the distance of each point to itself is 0, and the root has no slope there.

The kernel's values are right, exp(0) = 1; the derivative is what fails.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, loader

held_out = True


class Kernel(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = self.net(x)
        distance = (z[:, None] - z[None]).pow(2).sum(dim=2).sqrt()  # here
        kernel = (1 + distance) * torch.exp(-distance) + 0.1 * torch.eye(len(z))
        return y @ torch.linalg.solve(kernel, y) + torch.logdet(kernel)


def program(seed):
    data = [(torch.randn(6), torch.randn(())) for _ in range(24)]
    return Program(Kernel(), loader(data), Expected("backward", "", __file__, cause="undefined_gradient"))
