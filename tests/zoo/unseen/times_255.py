"""A net for pixels of 0 to 255 multiplies its input by 255, and a wrapper does it again; in fp16 the sum overflows.

The pictures are between 0 and 1: the module that makes them large is at fault.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, loader

held_out = True


class Pixels(nn.Module):
    def forward(self, x):
        return x * 255.0


class Digits(Module):
    def __init__(self):
        super().__init__()
        self.wrapper, self.inner = Pixels(), Pixels()
        self.net = nn.Sequential(nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 2))
        nn.init.constant_(self.net[0].weight, 0.05)

    def training_step(self, batch, batch_idx):
        picture, label = batch
        return nn.functional.cross_entropy(self.net(self.inner(self.wrapper(picture))), label)  # here


def program(seed):
    data = [(torch.rand(256), torch.tensor(i % 2)) for i in range(16)]
    expected = Expected("forward", "net.0", __file__, cause="input_scale", cause_module=("wrapper", "inner"))
    return Program(Digits(), loader(data), expected, precision="16-mixed")
