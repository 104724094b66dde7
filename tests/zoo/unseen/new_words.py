"""A vocabulary got new words, whose rows were set to the mean of no rows; one of them is used, and it is NaN.

The embedding was bad before the first step.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Language(Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 6)
        self.head = nn.Linear(6, 20)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self.words(batch[:, 0])), batch[:, 1])  # here


def program(seed):
    module = Language()
    new = 16 + draw(seed, 4)
    with torch.no_grad():
        module.words.weight[new] = module.words.weight[:0].mean(dim=0)
    data = list(torch.randint(16, (24, 2)))
    data[3][0] = new
    expected = Expected("weights", "words", __file__, tensor="words.weight", cause="nonfinite_weights")
    return Program(module, loader(data), expected)
