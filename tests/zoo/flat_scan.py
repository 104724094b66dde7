"""Scans are normalised by their own deviation where the batch is put together, and one scan is blank: 0 / 0."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw

held_out = True


class Scans(torch.utils.data.Dataset):
    def __init__(self, scans):
        self.scans = scans

    def __len__(self):
        return len(self.scans)

    def __getitem__(self, index):
        return self.scans[index], index % 2


def collate(samples):
    scans = torch.stack([(scan - scan.mean()) / scan.std() for scan, _ in samples])
    return scans, torch.tensor([label for _, label in samples])


class Scanner(pl.LightningModule):
    def __init__(self, width=6):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(4 * width, 2)

    def training_step(self, batch, batch_idx):
        scan, label = batch
        return nn.functional.cross_entropy(self.head(self.net(scan)), label)  # here

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def program(seed):
    scans = torch.randn(24, 1, 7, 7)
    blank = draw(seed, 8)
    scans[8 + blank] = 0.5
    data = torch.utils.data.DataLoader(Scans(scans), batch_size=8, collate_fn=collate)
    expected = Expected("input", "net.0", __file__, tensor="batch[0]", samples=[blank], cause="nonfinite_input")
    return Program(Scanner(), data, expected)
