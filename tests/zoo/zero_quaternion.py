"""The head of a pose net starts at zero, as residual heads do; its quaternion is divided by its length."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class PoseHead(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.shift = nn.Linear(width, 3)
        self.turn = nn.Linear(width, 4)
        nn.init.zeros_(self.turn.weight)
        nn.init.zeros_(self.turn.bias)

    def forward(self, hidden):
        turn = self.turn(hidden)
        return self.shift(hidden), turn / torch.linalg.vector_norm(turn, dim=1, keepdim=True)  # here


class Pose(pl.LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.trunk = nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = PoseHead(width)

    def training_step(self, batch, batch_idx):
        picture, shift, turn = batch
        moved, turned = self.head(self.trunk(picture))
        angle = 1 - (turned * turn).sum(dim=1).pow(2)
        return (moved - shift).pow(2).mean() + angle.mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def program(seed):
    turns = nn.functional.normalize(torch.randn(16, 4))
    data = [(torch.randn(1, 9, 9), torch.randn(3), turn) for turn in turns]
    expected = Expected("forward", "head", __file__, cause="undefined_operation")
    return Program(Pose(8 + draw(seed, 8)), loader(data), expected)
