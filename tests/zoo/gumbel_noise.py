"""Gumbel noise is made of 8-bit random numbers, and one of them is 1: `-log(-log(1))` is infinite."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader, mlp

held_out = True


class GumbelSoftmax(nn.Module):
    def __init__(self, temperature):
        super().__init__()
        self.temperature = temperature

    def forward(self, logits):
        uniform = torch.randint(1, 257, logits.shape) / 256
        noise = -torch.log(-torch.log(uniform))  # here
        return torch.softmax((logits + noise) / self.temperature, dim=-1)


class Discrete(Module):
    """An autoencoder whose code is one of 32 words."""

    def __init__(self, temperature=1.0):
        super().__init__()
        self.save_hyperparameters()
        self.encoder, self.decoder = mlp(6, 16, 32), mlp(32, 16, 6)
        self.code = GumbelSoftmax(temperature)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.decoder(self.code(self.encoder(batch))), batch)


def program(seed):
    data = list(torch.randn(160, 6))
    expected = Expected("forward", "code", __file__, cause="undefined_operation")
    return Program(Discrete(1.0 + draw(seed, 3)), loader(data), expected)
