"""After a restart the schedule of 1 / sqrt(step), in numpy, counts from 0 again: the learning rate is infinite."""

import numpy as np
import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


def factor(step, restart):
    with np.errstate(divide="ignore"):
        return float(np.float64(step + 1 if step < restart else step - restart) ** -0.5)


class Translator(Module):
    def __init__(self, restart=4):
        super().__init__()
        self.save_hyperparameters()
        self.words = nn.Embedding(12, 8)
        self.out = nn.Linear(8, 12)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.out(self.words(batch)), batch)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)  # here
        restart = self.hparams.restart
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, restart))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def program(seed):
    data = list(torch.randint(12, (64,)))
    expected = Expected("optimizer", "words", __file__, cause="optimizer_update", option="lr")
    return Program(Translator(restart=2 + draw(seed, 4)), loader(data), expected)
