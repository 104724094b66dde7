"""A record of a binary file was half written, and its bytes, all ones, are read as floats: NaN among the pixels.

The picture is bad as it leaves the loader.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Pictures(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))

    def training_step(self, batch, batch_idx):
        picture, label = batch
        return nn.functional.cross_entropy(self.net(picture), label)  # here


def program(seed):
    data = [(torch.rand(1, 8, 8), torch.tensor(i % 2)) for i in range(24)]
    torn = draw(seed, 8)
    data[16 + torn][0][0, 5:] = torch.full((3, 8), -1, dtype=torch.int32).view(torch.float32)
    expected = Expected("input", "", __file__, "", "batch[0]", [torn], cause="nonfinite_input")
    return Program(Pictures(), loader(data), expected)
