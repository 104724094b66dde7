"""A detector is trained with IoU; a box that was predicted and one that was drawn are both empty, and 0 / 0 is NaN.

The drawn box has no width, as one finds them in any data set; the division lacks an epsilon.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Detector(Module):
    def __init__(self):
        super().__init__()
        self.size = nn.Linear(6, 2)

    def training_step(self, batch, batch_idx):
        picture, box = batch
        size = torch.relu(self.size(picture))
        shared = torch.minimum(size, box).prod(dim=1)
        union = size.prod(dim=1) + box.prod(dim=1) - shared
        return (1 - shared / union).mean()  # here


def program(seed):
    data = [(torch.rand(6), 0.5 + torch.rand(2)) for _ in range(24)]
    empty = draw(seed, 8)
    data[8 + empty] = (torch.zeros(6), torch.tensor([0.0, 0.7]))
    module = Detector()
    nn.init.constant_(module.size.bias, -0.05)
    nn.init.constant_(module.size.weight, 0.3)
    expected = Expected("forward", "", __file__, samples=[empty], cause="undefined_operation")
    return Program(module, loader(data), expected)
