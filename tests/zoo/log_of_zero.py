"""A count model whose predicted rate is exactly 0 where a ReLU is off: its likelihood takes the log of that rate."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader, mlp


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def forward(self, hidden, counts):
        rate = torch.relu(self.linear(hidden)).squeeze(1)
        return (rate - counts * torch.log(rate)).mean()  # here


class CountModel(Module):
    """Several kinds of events, each with a head of its own."""

    def __init__(self, dead=0):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = mlp(4, 8, 8)
        self.heads = nn.ModuleList(Head() for _ in range(4))
        for place, head in enumerate(self.heads):
            nn.init.constant_(head.linear.bias, -50.0 if place == dead else 10.0)

    def training_step(self, batch, batch_idx):
        features, counts = batch
        hidden = self.encoder(features)
        return sum(head(hidden, counts[:, place]) for place, head in enumerate(self.heads))


def program(seed):
    dead = draw(seed, 4)
    data = [(torch.randn(4), torch.ones(4)) for _ in range(16)]
    expected = Expected("forward", f"heads.{dead}", __file__, cause="undefined_operation")
    return Program(CountModel(dead), loader(data), expected)
