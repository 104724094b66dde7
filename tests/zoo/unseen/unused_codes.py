"""A codebook is rewarded for its perplexity, exp(-sum p log p); a code that nobody uses has p = 0, and 0 * -inf is NaN.

Unused codes are usual at the start: the entropy lacks its limit at 0.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, loader

held_out = True


class Codebook(Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.codes = nn.Parameter(torch.randn(32, 4))

    def training_step(self, batch, batch_idx):
        hidden = self.encoder(batch)
        nearest = torch.cdist(hidden, self.codes).argmin(dim=1)
        share = nn.functional.one_hot(nearest, 32).float().mean(dim=0)
        entropy = -(share * torch.log(share)).sum()  # here
        return (hidden - self.codes[nearest]).pow(2).mean() - 0.1 * entropy.exp()


def program(seed):
    expected = Expected("forward", "", __file__, cause="undefined_operation")
    return Program(Codebook(), loader(list(torch.randn(24, 6))), expected)
