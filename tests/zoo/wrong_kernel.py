"""The encoder is compiled, by a back end that computes in fp16 what was meant to be fp32; eagerly all is well."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader, mlp


def fast_backend(graph, inputs):
    def run(*tensors):
        out = graph.forward(*tensors)
        return tuple((t * 1e3).half().float() / 1e3 if t.is_floating_point() else t for t in out)

    return run


class Regression(pl.LightningModule):
    def __init__(self, width=16):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = torch.compile(mlp(4, width, 8), backend=fast_backend)
        self.head = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        x, target = batch
        hidden = self.encoder(x)
        loss = nn.functional.mse_loss(self.head(hidden).squeeze(1), target)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def program(seed):
    features = torch.randn(24, 4)
    features[8:16] *= 400
    data = list(zip(features, torch.randn(24), strict=True))
    expected = Expected("", "", __file__, mark="", cause="compiled_code", cause_module="encoder")
    return Program(Regression(12 + draw(seed, 8)), loader(data), expected)
