"""The cosine is clamped to [-1, 1] before `acos`; the value is saved, but at 1 the derivative is infinite."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Geodesic(nn.Module):
    """The angle of the rotation between two rotation matrices."""

    def forward(self, a, b):
        trace = (a * b).sum(dim=(1, 2))
        return torch.acos(((trace - 1) / 2).clamp(-1, 1)).mean()  # here


class Registration(Module):
    """Turns about the first axis are predicted."""

    def __init__(self):
        super().__init__()
        self.angle = nn.Linear(4, 1)
        nn.init.zeros_(self.angle.bias)
        self.distance = Geodesic()

    def turn(self, angle):
        one, zero = torch.ones_like(angle), torch.zeros_like(angle)
        c, s = angle.cos(), angle.sin()
        return torch.stack([one, zero, zero, zero, c, -s, zero, s, c], dim=1).view(-1, 3, 3)

    def training_step(self, batch, batch_idx):
        scan, rotation = batch
        return self.distance(self.turn(self.angle(scan).squeeze(1)), rotation)


def program(seed):
    module = Registration()
    rotation = module.turn(0.5 + torch.rand(24))
    scan = torch.randn(24, 4)
    still = draw(seed, 8)
    scan[still], rotation[still] = 0.0, torch.eye(3)
    data = list(zip(scan, rotation, strict=True))
    return Program(
        module, loader(data), Expected("backward", "distance", __file__, samples=[still], cause="undefined_gradient")
    )
