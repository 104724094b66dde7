"""Metric learning: the distance of two equal pictures is 0, where the square root has no derivative."""

import torch

from tests.zoo.program import Expected, Module, Program, draw, loader, mlp


class Siamese(Module):
    def __init__(self):
        super().__init__()
        self.embed = mlp(6, 16, 4)

    def distance(self, left, right):
        return (self.embed(left) - self.embed(right)).pow(2).sum(dim=1).sqrt()  # here

    def training_step(self, batch, batch_idx):
        left, right, same = batch
        distance = self.distance(left, right)
        return torch.where(same, distance, torch.relu(1 - distance)).mean()


def program(seed):
    data = [(torch.randn(6), torch.randn(6), torch.tensor(False)) for _ in range(24)]
    twin = draw(seed, 8)
    data[8 + twin] = (data[0][0], data[0][0], torch.tensor(True))
    expected = Expected("backward", "", __file__, samples=[twin], cause="undefined_gradient")
    return Program(Siamese(), loader(data), expected)
