"""Masked language modelling: the loss of the masked tokens, summed, is divided by their number; once there is none."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class MaskedLanguage(pl.LightningModule):
    def __init__(self, words=20, width=16):
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Embedding(words + 1, width)
        layer = nn.TransformerEncoderLayer(width, 4, 32, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(width, words)

    def training_step(self, batch, batch_idx):
        words, masked = batch["words"], batch["masked"]
        logits = self.head(self.encoder(self.embed(words.masked_fill(masked, self.hparams.words))))
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), words, reduction="none")
        loss = (loss * masked).sum() / masked.sum()  # here
        self.log("mlm", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=5e-4, betas=(0.9, 0.98))


def program(seed):
    masked = torch.rand(40, 8) < 0.3
    masked[:, 0] = True
    none = 1 + draw(seed, 4)
    masked[8 * none : 8 * none + 8] = False
    data = [{"words": torch.randint(20, (8,)), "masked": mask} for mask in masked]
    expected = Expected("forward", "", __file__, cause=("empty_reduction", "undefined_operation"))
    return Program(MaskedLanguage(), loader(data), expected, precision="bf16-mixed")
