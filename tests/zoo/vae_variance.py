"""A variational autoencoder: the log variance of a far-off sample is large, and its exponential infinite."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader, mlp


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = nn.Linear(6, 2)
        self.log_variance = nn.Linear(6, 2)

    def encode(self, x):
        return self.mean(x), self.log_variance(x)

    def sample(self, mean, log_variance):
        return mean + torch.exp(log_variance) * torch.randn_like(mean)  # here


class VAE(Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.decoder = mlp(2, 16, 6)

    def training_step(self, batch, batch_idx):
        mean, log_variance = self.encoder.encode(batch)
        latent = self.encoder.sample(mean, log_variance)
        rebuilt = (self.decoder(latent) - batch).pow(2).sum(dim=1)
        prior = (mean.pow(2) + log_variance.clamp(max=10).exp() - log_variance - 1).sum(dim=1)
        return (rebuilt + 0.1 * prior).mean()


def program(seed):
    module = VAE()
    data = torch.randn(24, 6)
    far = draw(seed, 8)
    data[8 + far] = 1e4 * module.encoder.log_variance.weight[0].detach()
    expected = Expected("forward", "encoder", __file__, samples=[far], cause="extreme_sample", cause_tensor="batch")
    return Program(module, loader(list(data)), expected)
