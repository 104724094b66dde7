"""Dropout, augmentation by numpy, accumulated gradients; a gradient goes wrong in the second window."""

import random

import numpy as np
import torch
from torch import nn
from torchmetrics.classification import BinaryAccuracy

from tests.zoo.program import Expected, Module, Program, loader


class Augmented(Module):
    def __init__(self, width=16, twin=True):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(width, 2)
        self.accuracy = BinaryAccuracy()

    def configure_optimizers(self):
        rate = 1e-3 / self.trainer.estimated_stepping_batches
        return [torch.optim.AdamW(self.parameters(), lr=rate)], []

    def training_step(self, batch, batch_idx):
        features, label = batch
        noise = torch.from_numpy(np.random.randn(*features.shape)).to(features)
        features = features * random.uniform(0.9, 1.1) + 0.1 * noise
        out = self.head(self.net(features))
        self.log("accuracy", self.accuracy(out.argmax(dim=1), label))
        loss = nn.functional.cross_entropy(out, label)
        if self.hparams.twin and self.trainer.global_step == 1 and batch_idx == 5:
            loss = loss + (out - out.detach()).pow(2).sum(dim=1).sqrt().mean()  # here
        return loss


def program(seed, precision="32-true", twin=True):
    data = [(torch.randn(6), torch.tensor(i % 2)) for i in range(72)]
    return Program(
        Augmented(twin=twin), loader(data), Expected("backward", "", __file__),
        precision=precision, loss_scale=1.0, options={"accumulate_grad_batches": 3, "gradient_clip_val": 1.0},
    )  # fmt: skip
