"""Traffic at junctions for a GRU; a loop detector was being repaired, and its speeds are NaN in the file.

The loader hands on NaN: nothing in the model is wrong.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Traffic(Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 8, batch_first=True)
        self.head = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        return (self.head(self.gru(batch["speed"])[0][:, -1])[:, 0] - batch["next"]).pow(2).mean()  # here


def program(seed):
    data = [{"speed": torch.randn(6, 3), "next": torch.randn(())} for _ in range(24)]
    junction = draw(seed, 8)
    data[8 + junction]["speed"][2:4, 1] = float("nan")
    expected = Expected("input", "", __file__, "", "batch['speed']", [junction], cause="nonfinite_input")
    return Program(Traffic(), loader(data), expected)
