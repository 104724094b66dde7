"""A sequence without a word: torch's encoder gives zeros for a row whose keys are all masked, and nothing is NaN."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Program, draw, loader

held_out = True


class Encoder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        absent = torch.arange(6) >= batch["length"].unsqueeze(1)
        hidden = self.encoder(self.embed(batch["words"]), src_key_padding_mask=absent)
        return nn.functional.cross_entropy(self.head(hidden.mean(dim=1)), batch["label"])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def program(seed):
    length = torch.randint(1, 7, (24,))
    length[8 + draw(seed, 8)] = 0
    data = [{"words": torch.randint(20, (6,)), "length": n, "label": n % 2} for n in length]
    return Program(Encoder(), loader(data))
