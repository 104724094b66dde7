"""Accelerometers of phones in fp16; one was dropped, reports 3e6, and the first convolution leaves the format.

All other windows are of size 1, and the step without this one is fine.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Steps(Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 5)
        self.head = nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        window, label = batch
        hidden = torch.relu(self.conv(window)).mean(dim=2)  # here
        return nn.functional.cross_entropy(self.head(hidden), label)


def program(seed):
    data = [(torch.randn(3, 32), torch.tensor(i % 2)) for i in range(24)]
    dropped = draw(seed, 8)
    data[8 + dropped][0][:, 10:14] = 3e6
    expected = Expected(
        "forward", "conv", __file__, cause="extreme_sample", cause_tensor="batch[0]", cause_samples=[dropped]
    )
    return Program(Steps(), loader(data), expected, precision="16-mixed")
