"""Style transfer: the Gram matrix of the features adds up 16,384 positions before it is divided, beyond fp16."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader


class StyleLoss(nn.Module):
    def gram(self, features):
        batch, channels, height, width = features.shape
        flat = features.reshape(batch, channels, height * width)
        return torch.bmm(flat, flat.transpose(1, 2)) / (channels * height * width)  # here

    def forward(self, made, wanted):
        return nn.functional.mse_loss(self.gram(made), self.gram(wanted))


class Stylize(pl.LightningModule):
    def __init__(self, width=6):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Conv2d(3, 3, 3, padding=1)
        self.features = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU()).requires_grad_(False)
        nn.init.normal_(self.features[0].weight, mean=0.2, std=0.1)
        self.style = StyleLoss()

    def training_step(self, batch, batch_idx):
        picture, style = batch
        made = self.net(picture) + picture
        return self.style(self.features(made), self.features(style)) + (made - picture).abs().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), lr=1e-3)


def program(seed):
    data = [(torch.rand(3, 128, 128), torch.rand(3, 128, 128)) for _ in range(4)]
    expected = Expected("forward", "style", __file__, cause="fp16_overflow")
    return Program(Stylize(width=5 + draw(seed, 4)), loader(data, 2), expected, precision="16-mixed")
