"""A sensor dropped out: the recording holds NaN, which every layer hands on."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader


class Classifier(Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 5)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        hidden = self.norm(self.conv(batch["signal"])).relu().mean(dim=-1)  # here
        return nn.functional.cross_entropy(self.head(hidden), batch["label"])


def program(seed):
    signal = torch.randn(24, 3, 20)
    broken = draw(seed, 8)
    signal[8 + broken, 1, 5:9] = float("nan")
    data = [{"signal": s, "label": torch.tensor(1)} for s in signal]
    expected = Expected("input", "conv", __file__, tensor="batch['signal']", samples=[broken], cause="nonfinite_input")
    return Program(Classifier(), loader(data), expected)
