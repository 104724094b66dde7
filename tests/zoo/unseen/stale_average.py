"""A batch norm's running mean was divided by its count of batches, 0, when checkpoints were merged; it is in eval mode.

The buffer was NaN before the first step.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Frozen(Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 1)

    def training_step(self, batch, batch_idx):
        self.norm.eval()
        return self.head(self.norm(batch)).pow(2).mean()  # here


def program(seed):
    module = Frozen()
    module.norm.running_mean[draw(seed, 6)] /= 0 * module.norm.num_batches_tracked
    expected = Expected("weights", "norm", __file__, tensor="norm.running_mean", cause="nonfinite_weights")
    return Program(module, loader(list(torch.randn(24, 6))), expected)
