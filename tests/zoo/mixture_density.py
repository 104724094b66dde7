"""A width is `elu(x) + 1`, as a popular mixture density net has it; from x = -17 on that is exactly 0 in fp32."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader, mlp

held_out = True


class NormalLikelihood(nn.Module):
    def forward(self, mean, width, target):
        z = (target.unsqueeze(1) - mean) / width  # here
        return -0.5 * z.pow(2) - width.log()


class MixtureDensity(Module):
    def __init__(self):
        super().__init__()
        self.trunk = mlp(4, 12, 12)
        self.mean, self.width, self.share = nn.Linear(12, 3), nn.Linear(12, 3), nn.Linear(12, 3)
        self.likelihood = NormalLikelihood()

    def training_step(self, batch, batch_idx):
        features, target = batch
        hidden = self.trunk(features)
        width = nn.functional.elu(self.width(hidden)) + 1
        share = self.share(hidden).log_softmax(dim=1)
        return -torch.logsumexp(share + self.likelihood(self.mean(hidden), width, target), dim=1).mean()


def program(seed):
    module = MixtureDensity()
    nn.init.zeros_(module.width.weight)
    module.width.bias.data[draw(seed, 3)] = -20.0
    data = list(zip(torch.randn(24, 4), torch.randn(24), strict=True))
    expected = Expected(
        "forward",
        "likelihood",
        __file__,
        cause=("undefined_operation", "extreme_weights"),
        cause_tensor="width.bias",
    )
    return Program(module, loader(data), expected)
