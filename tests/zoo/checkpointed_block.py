"""The standard deviation within a checkpointed block: of equal values it is 0, and its derivative infinite."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.program import Expected, Module, Program, draw, loader


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        hidden = self.linear(x)
        centred = hidden - hidden.mean(dim=-1, keepdim=True)
        spread = centred.pow(2).mean(dim=-1, keepdim=True).sqrt()  # here
        return x + centred / (spread + 1e-5)


class Checkpointed(Module):
    def __init__(self, flat=0):
        super().__init__()
        self.save_hyperparameters()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        nn.init.zeros_(self.blocks[flat].linear.weight)
        nn.init.ones_(self.blocks[flat].linear.bias)

    def training_step(self, batch, batch_idx):
        for block in self.blocks:
            batch = checkpoint(block, batch, use_reentrant=False)
        return batch.pow(2).mean()


def program(seed):
    flat = draw(seed, 3)
    expected = Expected("backward", f"blocks.{flat}", __file__, cause="undefined_gradient")
    return Program(Checkpointed(flat), loader(list(torch.randn(16, 6))), expected)
