"""Several tasks with missing labels: NaN becomes 0 and its error is multiplied by 0."""

import torch
from torch import nn

from tests.zoo.program import Module, Program, loader, mlp

held_out = True


class ManyTasks(Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(5, 16, 3)

    def training_step(self, batch, batch_idx):
        features, labels = batch
        known = ~labels.isnan()
        error = nn.functional.binary_cross_entropy_with_logits(
            self.net(features), labels.nan_to_num(0.0), reduction="none"
        )
        return (error * known).sum() / known.sum().clamp(min=1)


def program(seed):
    labels = torch.randint(2, (24, 3)).float()
    labels[torch.rand(24, 3) < 0.4] = float("nan")
    labels[seed % 24] = float("nan")
    return Program(ManyTasks(), loader(list(zip(torch.randn(24, 5), labels, strict=True))))
