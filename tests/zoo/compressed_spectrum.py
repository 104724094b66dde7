"""Speech is cleaned with a loss on |STFT| ** 0.3; padding is multiplied by 0, and there the power has no slope."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class SpectralLoss(nn.Module):
    def __init__(self, size=16):
        super().__init__()
        self.size = size
        self.register_buffer("window", torch.hann_window(size))

    def compressed(self, sound):
        spectrum = torch.stft(sound, self.size, window=self.window, return_complex=True)
        return spectrum.abs() ** 0.3  # here

    def forward(self, made, clean):
        return nn.functional.l1_loss(self.compressed(made), self.compressed(clean))


class Denoiser(pl.LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Conv1d(1, width, 5, padding=2), nn.PReLU(), nn.Conv1d(width, 1, 5, padding=2))
        self.spectral = SpectralLoss()

    def training_step(self, batch, batch_idx):
        noisy, clean, length = batch["noisy"], batch["clean"], batch["length"]
        voiced = (torch.arange(noisy.shape[1], device=noisy.device) < length.unsqueeze(1)).float()
        made = self.net(noisy.unsqueeze(1)).squeeze(1) * voiced
        return self.spectral(made, clean * voiced) + (made - clean * voiced).abs().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def program(seed):
    length = torch.full((24,), 64)
    length[8 + draw(seed, 8)] = 24
    data = [{"noisy": torch.randn(64), "clean": torch.randn(64), "length": n} for n in length]
    expected = Expected("backward", "spectral", __file__, cause="undefined_gradient")
    return Program(Denoiser(), loader(data), expected)
