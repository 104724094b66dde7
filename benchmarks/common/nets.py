"""The networks that several benchmarks train."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Transformer(nn.Module):
    """A decoder as GPT-2 has it; its small form is for CPUs."""

    def __init__(self, width: int, layers: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.token(tokens) + self.position))


def batch_norms() -> nn.Module:
    """53 of them, as a ResNet-50 has, each behind a small convolution."""
    parts = [part for _ in range(53) for part in (nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU())]
    return nn.Sequential(*parts)


def batch_norm_net() -> nn.Module:
    """53 batch norms, as many as a ResNet-50 has: 106 floating buffers and 53 counters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, stride=2)]
    for _ in range(53):
        layers += [nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 1)]
    return nn.Sequential(*layers)
