"""bf16 with masks of finfo.min, added twice to -inf, and activations of 1e20 that are divided by their maximum."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Program, loader

held_out = True


class Extreme(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        x, lengths = batch
        x = x / x.abs().amax(dim=(1, 2), keepdim=True)
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        least = torch.finfo(scores.dtype).min
        future = torch.full((6, 6), least).triu(1)
        absent = (torch.arange(6) >= lengths.unsqueeze(1)).float().unsqueeze(1) * least
        seen = torch.softmax(scores.float() + future + absent, dim=-1) @ self.value(x).float()
        return self.head(seen).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def program(seed):
    data = list(zip(1e20 * torch.randn(24, 6, 8), torch.randint(1, 7, (24,)), strict=True))
    return Program(Extreme(), loader(data), precision="bf16-mixed")
