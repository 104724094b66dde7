"""Adam with a learning rate of 3: the weights of a deep net run away, and in fp16 that is soon beyond the format."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class Deep(pl.LightningModule):
    def __init__(self, width=32, lr=3.0):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )

    def training_step(self, batch, batch_idx):
        x, target = batch
        return nn.functional.mse_loss(self.net(x).squeeze(1), target)  # here

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


def program(seed):
    x = torch.randn(400, 4)
    module = Deep(width=24 + 4 * draw(seed, 4))
    tensors = tuple(f"net.{part}.{kind}" for part in (0, 2, 4) for kind in ("weight", "bias"))
    expected = Expected(
        "backward",
        ("net.2", "net.4"),
        __file__,
        cause="divergence",
        cause_module=("net.0", "net.2", "net.4", ""),
        cause_tensor=tensors,
    )
    return Program(module, loader(list(zip(x, x.sum(dim=1), strict=True))), expected, precision="16-mixed")
