"""Sound with 24 bits was converted to floats and never divided by 2 ** 23; in fp16 the first convolution overflows.

Every clip is that loud, so no sample is at fault: the scale of the input is.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Sound(Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 8, 9)
        self.head = nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        clip, label = batch
        hidden = torch.relu(self.conv(clip)).mean(dim=2)  # here
        return nn.functional.cross_entropy(self.head(hidden), label)


def program(seed):
    wave = torch.sin(torch.arange(64) * (0.05 + 0.01 * draw(seed, 4)))
    data = [(4e6 * wave[None] * (0.9 + 0.1 * torch.rand(())), torch.tensor(i % 2)) for i in range(16)]
    expected = Expected("forward", "conv", __file__, cause="input_scale", cause_tensor="batch[0]")
    return Program(Sound(), loader(data), expected, precision="16-mixed")
