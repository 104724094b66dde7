"""Segmentation with unlabelled pixels: in one batch every pixel has the ignored label, and the mean is over nothing."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader


class Segmentation(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
        self.loss = nn.CrossEntropyLoss(ignore_index=255)

    def training_step(self, batch, batch_idx):
        image, labels = batch
        return self.loss(self.net(image), labels)  # here


def program(seed):
    labels = torch.randint(3, (12, 8, 8))
    empty = draw(seed, 3)
    labels[4 * empty : 4 * empty + 4] = 255
    data = [(torch.randn(1, 8, 8), label) for label in labels]
    expected = Expected("forward", "loss", __file__, cause="empty_reduction")
    return Program(Segmentation(), loader(data, 4), expected)
