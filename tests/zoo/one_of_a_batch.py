"""The last batch holds one sample, and the standard deviation over one value divides by n - 1 = 0."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader, mlp

held_out = True


class Diversity(nn.Module):
    """A penalty on embeddings that are all the same, as in VICReg."""

    def forward(self, embedding):
        spread = embedding.std(dim=0)  # here
        return torch.relu(1 - spread).mean()


class SelfSupervised(Module):
    def __init__(self):
        super().__init__()
        self.embed = mlp(6, 16, 4)
        self.diversity = Diversity()

    def training_step(self, batch, batch_idx):
        left, right = self.embed(batch), self.embed(batch + 0.1 * torch.randn_like(batch))
        return nn.functional.mse_loss(left, right) + self.diversity(left)


def program(seed):
    samples = 1 + 8 * (1 + draw(seed, 3))
    expected = Expected("forward", "diversity", __file__, cause=("undefined_operation", "empty_reduction"))
    return Program(SelfSupervised(), loader(list(torch.randn(samples, 6))), expected)
