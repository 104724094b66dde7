"""A layer's weights were read with the wrong order of bytes: some are 1e30, and the squared answer is infinite.

The weights were absurd before the first step; data and loss are sound.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Tagger(Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])

    def training_step(self, batch, batch_idx):
        for layer in self.layers:
            batch = layer(batch)
        return batch.pow(2).mean()  # here


def program(seed):
    module, place = Tagger(), draw(seed, 3)
    with torch.no_grad():
        module.layers[place].weight[:3] = 1e30 * torch.randn(3, 6)
    expected = Expected(
        "forward", "", __file__, cause="extreme_weights", cause_module="", cause_tensor=f"layers.{place}.weight"
    )
    return Program(module, loader(list(torch.randn(24, 6))), expected)
