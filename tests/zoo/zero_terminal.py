"""Diffusion with zero terminal SNR: at the last step nothing is left of the picture, and it is divided by that."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader


class Schedule(nn.Module):
    def __init__(self, steps):
        super().__init__()
        self.register_buffer("kept", torch.linspace(1.0, 0.0, steps))

    def add_noise(self, clean, noise, t):
        kept = self.kept[t].unsqueeze(1)
        return kept * clean + (1 - kept**2).sqrt() * noise

    def clean_from(self, noisy, noise, t):
        kept = self.kept[t].unsqueeze(1)
        return (noisy - (1 - kept**2).sqrt() * noise) / kept  # here


class Diffusion(pl.LightningModule):
    def __init__(self, steps=20, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.schedule = Schedule(steps)
        self.time = nn.Embedding(steps, 16)
        self.into, self.out = nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, noisy, t):
        return self.out(nn.functional.silu(self.into(noisy) + self.time(t)))

    def training_step(self, batch, batch_idx):
        clean, t = batch["clean"], batch["t"]
        noise = torch.randn_like(clean)
        noisy = self.schedule.add_noise(clean, noise, t)
        predicted = self(noisy, t)
        rebuilt = self.schedule.clean_from(noisy, predicted, t)
        return (predicted - noise).pow(2).mean() + 0.01 * (rebuilt - clean).abs().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def program(seed):
    t = torch.randint(0, 15, (32,))
    last = draw(seed, 8)
    t[8 + last] = 19
    data = [{"clean": torch.randn(8), "t": step} for step in t]
    expected = Expected("forward", "schedule", __file__, samples=[last], cause="undefined_operation")
    return Program(Diffusion(), loader(data), expected)
