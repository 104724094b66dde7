"""Messages are divided by the roots of the degrees; the padding of a small graph has degree 0: 0 ** -0.5 is inf."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class GCN(nn.Module):
    def __init__(self, into, out):
        super().__init__()
        self.linear = nn.Linear(into, out)

    def forward(self, nodes, adjacency):
        scale = adjacency.sum(dim=-1) ** -0.5  # here
        adjacency = scale.unsqueeze(-1) * adjacency * scale.unsqueeze(-2)
        return torch.relu(adjacency @ self.linear(nodes))


class Molecules(Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = GCN(5, 8), GCN(8, 8)
        self.energy = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        nodes, adjacency, energy = batch
        hidden = self.second(self.first(nodes, adjacency), adjacency)
        return nn.functional.mse_loss(self.energy(hidden.sum(dim=1)).squeeze(1), energy)


def program(seed):
    adjacency = (torch.eye(6).roll(1, 0) + torch.eye(6).roll(-1, 0)).repeat(24, 1, 1)
    small = draw(seed, 8)
    adjacency[8 + small, 5] = adjacency[8 + small, :, 5] = 0.0
    data = [(torch.randn(6, 5), a, torch.randn(())) for a in adjacency]
    expected = Expected("forward", "first", __file__, samples=[small], cause="undefined_operation")
    return Program(Molecules(), loader(data), expected)
