"""Attention without the division by sqrt(d): as the weights of one layer are large, its scores exceed 65504 in fp16."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        scores = self.q(x) @ self.k(x).transpose(-1, -2)  # here
        scores = scores - scores.amax(dim=-1, keepdim=True)
        return x + scores.softmax(dim=-1) @ self.v(x)


class Net(Module):
    def __init__(self, large=0):
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.ModuleList(Attention(16) for _ in range(3))
        nn.init.constant_(self.layers[large].q.bias, 200.0)
        nn.init.constant_(self.layers[large].k.bias, 200.0)

    def training_step(self, batch, batch_idx):
        for layer in self.layers:
            batch = layer(batch)
        return batch.pow(2).mean()


def program(seed):
    large = draw(seed, 3)
    data = list(torch.randn(8, 5, 16))
    expected = Expected(
        "forward",
        f"layers.{large}",
        __file__,
        cause=("fp16_overflow", "extreme_weights"),
        cause_tensor=f"layers.{large}.q.bias",
    )
    return Program(Net(large), loader(data, 4), expected, precision="16-mixed")
