"""After each update the rows of the spatial filter are scaled to length 1; one row is all zeros, and becomes NaN."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader


class EEGNet(pl.LightningModule):
    def __init__(self, filters=4, dead=0):
        super().__init__()
        self.save_hyperparameters()
        self.spatial = nn.Linear(8, filters, bias=False)
        self.temporal = nn.Conv1d(filters, 8, 5)
        self.head = nn.Linear(8, 2)
        nn.init.zeros_(self.spatial.weight[dead])
        nn.init.zeros_(self.temporal.weight[:, dead])

    def forward(self, signal):
        mixed = self.spatial(signal.transpose(1, 2)).transpose(1, 2)  # here
        return self.head(nn.functional.elu(self.temporal(mixed)).mean(dim=2))

    def training_step(self, batch, batch_idx):
        signal, label = batch
        return nn.functional.cross_entropy(self(signal), label)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        rows = self.spatial.weight.data
        self.spatial.weight.data = rows / rows.norm(dim=1, keepdim=True)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam([p for p in self.parameters() if p is not self.spatial.weight], lr=1e-3)
        optimizer.add_param_group({"params": [self.spatial.weight], "lr": 0.0})
        return optimizer


def program(seed):
    data = [(torch.randn(8, 20), torch.tensor(i % 2)) for i in range(24)]
    module = EEGNet(dead=draw(seed, 4))
    expected = Expected("weights", "spatial", __file__, tensor="spatial.weight", cause="nonfinite_weights")
    return Program(module, loader(data), expected)
