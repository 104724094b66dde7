"""Polynomial decay, `(1 - step / total) ** 0.9`, in numpy; the run goes on past `total`, where the base is negative."""

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader


class Segmenter(pl.LightningModule):
    def __init__(self, total=4):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1))

    def training_step(self, batch, batch_idx):
        picture, labels = batch
        loss = nn.functional.cross_entropy(self.net(picture), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)  # here
        total = self.hparams.total

        def decay(step):
            with np.errstate(invalid="ignore"):
                return np.power(np.float64(1 - step / total), 0.9)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def program(seed):
    data = [(torch.randn(1, 6, 6), torch.randint(2, (6, 6))) for _ in range(80)]
    expected = Expected("optimizer", "net.0", __file__, cause="optimizer_update", option="lr")
    return Program(Segmenter(total=3 + draw(seed, 4)), loader(data), expected)
