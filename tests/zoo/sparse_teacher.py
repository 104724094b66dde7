"""Distillation: the teacher's probabilities are kept for the best three classes, and 0 * log 0 is NaN."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader, mlp

held_out = True


class Divergence(nn.Module):
    def forward(self, logits, teacher):
        return (teacher * (teacher.log() - logits.log_softmax(dim=1))).sum(dim=1).mean()  # here


class Student(Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(6, 12, 5)
        self.divergence = Divergence()

    def training_step(self, batch, batch_idx):
        features, teacher = batch
        return self.divergence(self.net(features), teacher)


def program(seed):
    teacher = torch.softmax(torch.randn(24, 5), dim=1)
    cut = draw(seed, 8)
    row = teacher[8 + cut]
    row[row.argsort()[:2]] = 0.0
    data = list(zip(torch.randn(24, 6), teacher, strict=True))
    expected = Expected("forward", "divergence", __file__, samples=[cut], cause="undefined_operation")
    return Program(Student(), loader(data), expected)
