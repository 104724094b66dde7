"""Somebody touched an electrode: one window is at the amplifier's limit, and the convolution leaves fp16."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.temporal = nn.Conv1d(4, 64, 16, stride=8)
        self.norm = nn.GroupNorm(8, 64)

    def forward(self, eeg):
        return torch.nn.functional.gelu(self.norm(self.temporal(eeg))).mean(dim=-1)  # here


class Sleep(Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Linear(64, 5)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self.encoder(batch["eeg"])), batch["stage"])


def program(seed):
    eeg = torch.randn(24, 4, 64)
    touched = draw(seed, 8)
    eeg[8 + touched] = 6e4
    data = [{"eeg": window, "stage": torch.tensor(i % 5)} for i, window in enumerate(eeg)]
    expected = Expected(
        "forward",
        "encoder.temporal",
        __file__,
        samples=[touched],
        cause="extreme_sample",
        cause_tensor="batch['eeg']",
    )
    return Program(Sleep(), loader(data), expected, precision="16-mixed")
