"""Hyperbolic embeddings are kept within 1 - 1e-8 of the disk, which is 1 in fp32; the distance is its atanh."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class Disk(nn.Module):
    limit = 1 - 1e-8

    def project(self, x):
        norm = x.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        return torch.where(norm > self.limit, x / norm * self.limit, x)

    def forward(self, x):
        norm = x.norm(dim=-1)
        return 2 * torch.atanh(norm.clamp(max=self.limit))  # here


class Taxonomy(pl.LightningModule):
    def __init__(self, terms=20, width=4):
        super().__init__()
        self.save_hyperparameters()
        self.place = nn.Embedding(terms, width)
        nn.init.uniform_(self.place.weight, -0.1, 0.1)
        self.disk = Disk()

    def training_step(self, batch, batch_idx):
        term, depth = batch
        where = self.disk.project(self.place(term))
        loss = (self.disk(where) - depth).pow(2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def program(seed):
    module = Taxonomy()
    leaf = draw(seed, 8)
    terms = torch.cat([torch.randint(0, 19, (24,)), torch.randint(0, 19, (8,))])
    terms[16 + leaf] = 19
    module.place.weight.data[19] = torch.tensor([2.0, 0, 0, 0])
    data = [(term, 0.2 + torch.rand(())) for term in terms]
    expected = Expected("forward", "disk", __file__, samples=[leaf], cause="undefined_operation")
    return Program(module, loader(data), expected)
