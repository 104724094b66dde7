"""The embedding, tied to the output, is drawn with a deviation of d_model instead of 1 / sqrt(d_model); in fp16."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader


class Decoder(nn.Module):
    def __init__(self, words, width):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        nn.init.normal_(self.embed.weight, std=width)
        self.mix = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, words):
        hidden = self.embed(words)
        hidden = hidden + self.mix(hidden)
        return hidden @ self.embed.weight.T  # here


class CharModel(pl.LightningModule):
    def __init__(self, words=30, width=96):
        super().__init__()
        self.save_hyperparameters()
        self.decoder = Decoder(words, width)

    def training_step(self, text, batch_idx):
        logits = self.decoder(text[:, :-1])
        return nn.functional.cross_entropy(logits.transpose(1, 2), text[:, 1:])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


def program(seed):
    module = CharModel(width=96 + 8 * draw(seed, 5))
    expected = Expected("forward", "decoder", __file__, cause="extreme_weights", cause_tensor="decoder.embed.weight")
    return Program(module, loader(list(torch.randint(30, (24, 9)))), expected, precision="16-mixed")
