"""A recurrent net with ReLU over 60 steps, plain SGD and no clipping: its recurrent matrix grows until fp32 ends."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader


class Adding(pl.LightningModule):
    def __init__(self, hidden=16):
        super().__init__()
        self.save_hyperparameters()
        self.rnn = nn.RNN(2, hidden, nonlinearity="relu", batch_first=True)
        nn.init.eye_(self.rnn.weight_hh_l0)
        self.out = nn.Linear(hidden, 1)

    def forward(self, x):
        states, _ = self.rnn(x)  # here
        return self.out(states[:, -1]).squeeze(1)

    def training_step(self, batch, batch_idx):
        x, total = batch
        loss = nn.functional.mse_loss(self(x), total)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def program(seed):
    x = torch.rand(320, 60, 2)
    data = list(zip(x, x[..., 0].sum(dim=1), strict=True))
    expected = Expected(
        "forward",
        "rnn",
        __file__,
        cause="divergence",
        cause_tensor=("rnn.weight_hh_l0", "rnn.weight_ih_l0", "out.weight"),
    )
    return Program(Adding(hidden=12 + draw(seed, 8)), loader(data), expected)
