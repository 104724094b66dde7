"""A normalising flow gets pixels from 0 to 255 instead of 0 to 1: the scale in its first coupling is exp(hundreds)."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader, mlp

held_out = True


class Coupling(nn.Module):
    def __init__(self, width, flip):
        super().__init__()
        self.flip = flip
        self.net = mlp(width // 2, 32, width)

    def forward(self, x):
        kept, changed = x.chunk(2, dim=1)
        if self.flip:
            kept, changed = changed, kept
        log_scale, shift = self.net(kept).chunk(2, dim=1)
        changed = changed * torch.exp(log_scale) + shift  # here
        return torch.cat([kept, changed], dim=1), log_scale.sum(dim=1)


class Flow(pl.LightningModule):
    def __init__(self, width=8, depth=3):
        super().__init__()
        self.save_hyperparameters()
        self.couplings = nn.ModuleList(Coupling(width, flip=i % 2 == 1) for i in range(depth))
        for coupling in self.couplings:
            nn.init.orthogonal_(coupling.net[2].weight, gain=4.0)

    def training_step(self, pixels, batch_idx):
        volume = 0.0
        for coupling in self.couplings:
            pixels, log_scale = coupling(pixels)
            volume = volume + log_scale
        loss = (0.5 * pixels.pow(2).sum(dim=1) - volume).mean()
        self.log("nll", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-4)


def program(seed):
    data = list(torch.randint(0, 256, (32, 8 + 2 * draw(seed, 4))).float())
    module = Flow(width=data[0].numel())
    expected = Expected("forward", "couplings.0", __file__, cause="input_scale", cause_tensor="batch")
    return Program(module, loader(data), expected)
