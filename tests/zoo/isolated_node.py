"""A graph net divides the sum of each node's messages by its degree; one node has no neighbour."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader


class MeanConvolution(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, nodes, edges):
        source, target = edges
        messages = torch.zeros_like(nodes).index_add(0, target, self.linear(nodes)[source])
        degree = torch.zeros(len(nodes)).index_add(0, target, torch.ones(len(target)))
        return nodes + torch.relu(messages / degree.unsqueeze(1))  # here


class GraphNet(Module):
    def __init__(self):
        super().__init__()
        self.convolutions = nn.ModuleList(MeanConvolution(4) for _ in range(3))
        self.readout = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        nodes, edges = batch["nodes"], batch["edges"]
        for convolution in self.convolutions:
            nodes = convolution(nodes, edges)
        return self.readout(nodes).pow(2).mean()


def program(seed):
    ring = torch.stack([torch.arange(10), torch.arange(10).roll(1)])
    isolated = draw(seed, 10)
    broken = ring[:, ring[1] != isolated]
    graphs = [{"nodes": torch.randn(10, 4), "edges": edges} for edges in (ring, ring, broken)]
    expected = Expected(
        "forward", "convolutions.0", __file__, samples=[isolated], cause=("undefined_operation", "empty_reduction")
    )
    return Program(GraphNet(), loader(graphs, None), expected)
