"""A checkpoint was stored as fp16: one bias of it did not fit and is infinite since."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class Tower(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = nn.functional.gelu(layer(x))  # here
        return x


class TwoTowers(pl.LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.texts, self.pictures = Tower(width), Tower(width)

    def training_step(self, batch, batch_idx):
        text = nn.functional.normalize(self.texts(batch["text"]), dim=1)
        picture = nn.functional.normalize(self.pictures(batch["picture"]), dim=1)
        logits = text @ picture.T / 0.07
        labels = torch.arange(len(logits), device=self.device)
        return nn.functional.cross_entropy(logits, labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def program(seed):
    module, place = TwoTowers(), draw(seed, 3)
    stored = {name: value.half() for name, value in module.pictures.state_dict().items()}
    stored[f"layers.{place}.bias"] = (1e5 * torch.ones(8)).half()
    module.pictures.load_state_dict(stored)
    data = [{"text": torch.randn(8), "picture": torch.randn(8)} for _ in range(16)]
    name = f"pictures.layers.{place}"
    expected = Expected("weights", name, __file__, tensor=f"{name}.bias", cause="nonfinite_weights")
    return Program(module, loader(data), expected)
