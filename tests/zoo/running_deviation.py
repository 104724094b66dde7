"""Observations are divided by a running deviation that starts at 0 and is used once before it is first updated."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, loader, mlp


class RunningNorm(nn.Module):
    def __init__(self, width, momentum=0.1):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.zeros(width))

    def forward(self, x):
        scaled = (x - self.mean) / self.deviation  # here
        if self.training:
            self.mean.lerp_(x.detach().mean(dim=0), self.momentum)
            self.deviation.lerp_(x.detach().std(dim=0), self.momentum)
        return scaled


class Policy(pl.LightningModule):
    def __init__(self, observations=4, actions=2):
        super().__init__()
        self.save_hyperparameters()
        self.normalize = RunningNorm(observations)
        self.actor = mlp(observations, 32, actions)

    def training_step(self, batch, batch_idx):
        logits = self.actor(self.normalize(batch["observation"]))
        chosen = torch.distributions.Categorical(logits=logits, validate_args=False).log_prob(batch["action"])
        return -(chosen * batch["advantage"]).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-4)


def program(seed):
    data = [
        {"observation": torch.randn(4 + seed), "action": torch.tensor(i % 2), "advantage": torch.randn(())}
        for i in range(16)
    ]
    expected = Expected("forward", "normalize", __file__, cause="undefined_operation")
    return Program(Policy(4 + seed), loader(data), expected)
