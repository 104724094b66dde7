"""Graph attention over molecules as dense matrices, without self-loops: one molecule has an atom without a bond."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class GraphAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.values = nn.Linear(width, width)
        self.sends, self.receives = nn.Linear(width, 1), nn.Linear(width, 1)

    def forward(self, atoms, bonds):
        scores = nn.functional.leaky_relu(self.receives(atoms) + self.sends(atoms).transpose(1, 2), 0.2)
        scores = torch.where(bonds > 0, scores, torch.full_like(scores, float("-inf")))
        return nn.functional.elu(torch.softmax(scores, dim=-1) @ self.values(atoms))  # here


class Molecules(pl.LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Linear(3, width)
        self.layers = nn.ModuleList([GraphAttention(width), GraphAttention(width)])
        self.energy = nn.Linear(width, 1)

    def training_step(self, batch, batch_idx):
        atoms = self.embed(batch["atoms"])
        for layer in self.layers:
            atoms = atoms + layer(atoms, batch["bonds"])
        energy = self.energy(atoms).sum(dim=(1, 2))
        return nn.functional.mse_loss(energy, batch["energy"])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def program(seed):
    ring = torch.roll(torch.eye(6), 1, dims=0)
    ring = ring + ring.T
    data = [{"atoms": torch.randn(6, 3), "bonds": ring.clone(), "energy": torch.randn(())} for _ in range(24)]
    alone, atom = draw(seed, 8), draw(seed + 1, 6)
    data[8 + alone]["bonds"][atom] = 0
    data[8 + alone]["bonds"][:, atom] = 0
    expected = Expected("forward", "layers.0", __file__, samples=[alone], cause="masked_attention")
    return Program(Molecules(), loader(data), expected)
