"""Triplets that are satisfied are left out of the mean; in one batch all of them are."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader, mlp


class TripletLoss(nn.Module):
    def __init__(self, margin=0.2):
        super().__init__()
        self.margin = margin

    def forward(self, anchor, positive, negative):
        near = (anchor - positive).pow(2).sum(dim=1)
        far = (anchor - negative).pow(2).sum(dim=1)
        violation = near - far + self.margin
        return violation[violation > 0].mean()  # here


class Retrieval(pl.LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.embed = mlp(6, 16, width)
        self.criterion = TripletLoss()

    def training_step(self, batch, batch_idx):
        loss = self.criterion(*(self.embed(part) for part in batch))
        self.log("triplet", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-4)


def program(seed):
    anchors = torch.randn(32, 6)
    data = [(a, a + torch.randn(6), torch.randn(6)) for a in anchors]
    easy = 1 + draw(seed, 3)
    for i in range(8 * easy, 8 * easy + 8):
        data[i] = (anchors[i], anchors[i], anchors[i] + 40 * torch.randn(6).sign())
    expected = Expected("forward", "criterion", __file__, cause="empty_reduction")
    return Program(Retrieval(), loader(data), expected)
