"""In bf16 the sigmoid of 7 is 1 already, and `log(1 - p)` infinite: the loss should have been made from the logits."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader


class BinaryLoss(nn.Module):
    def forward(self, logits, label):
        p = torch.sigmoid(logits)
        return -(label * torch.log(p) + (1 - label) * torch.log(1 - p)).mean()  # here


class Classifier(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))
        self.loss = BinaryLoss()

    def training_step(self, batch, batch_idx):
        features, label = batch
        return self.loss(self.net(features).squeeze(1), label)


def program(seed):
    module = Classifier()
    features = 0.1 * torch.randn(24, 6)
    sure = draw(seed, 8)
    with torch.no_grad():  # a direction in which the logit grows
        nn.init.ones_(module.net[2].weight)
        features[8 + sure] = 30 * module.net[0].weight.sum(dim=0)
    data = [(row, torch.zeros(())) for row in features]
    expected = Expected(
        "forward",
        "loss",
        __file__,
        samples=[sure],
        cause=("undefined_operation", "extreme_sample"),
        cause_tensor="batch[0]",
    )
    return Program(module, loader(data), expected, precision="bf16-mixed")
