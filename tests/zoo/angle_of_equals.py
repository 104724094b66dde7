"""The angle between two rotations by `acos`: rounding takes the cosine of equal ones beyond 1."""

import torch

from tests.zoo.program import Expected, Module, Program, draw, loader, mlp


def angle(a, b):
    cosine = (a * b).sum(dim=-1) / (a.norm(dim=-1) * b.norm(dim=-1)) * (1 + 1e-6)
    return torch.acos(cosine)  # here


class Pose(Module):
    """Predicts a quaternion as a small change of the given one."""

    def __init__(self):
        super().__init__()
        self.net = mlp(4, 16, 4)

    def training_step(self, batch, batch_idx):
        start, target = batch
        return angle(start + self.net(start - 1.0), target).mean()


def program(seed):
    module = Pose()
    start = torch.randn(24, 4)
    equal = draw(seed, 8)
    with torch.no_grad():
        target = torch.randn(24, 4)
        target[equal] = 2 * (start + module.net(start - 1.0))[equal]
    data = list(zip(start, target, strict=True))
    expected = Expected("forward", "", __file__, samples=[equal], cause="undefined_operation")
    return Program(module, loader(data), expected)
