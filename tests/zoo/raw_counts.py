"""Pictures of a microscope with 16 bits a pixel are not divided by anything, and the first convolution leaves fp16."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Cells(Module):
    def __init__(self, channels=8):
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Conv2d(1, channels, 5)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, 2)
        nn.init.constant_(self.stem.weight, 0.2)  # a filter that blurs

    def training_step(self, batch, batch_idx):
        picture, label = batch
        hidden = torch.relu(self.norm(self.stem(picture)))  # here
        return nn.functional.cross_entropy(self.head(hidden.mean(dim=(2, 3))), label)


def program(seed):
    data = [(2e4 * (1 + torch.rand(1, 8, 8)), torch.tensor(i % 2)) for i in range(16)]
    expected = Expected("forward", "stem", __file__, cause="input_scale", cause_tensor="batch[0]")
    return Program(Cells(8 + draw(seed, 8)), loader(data), expected, precision="16-mixed")
