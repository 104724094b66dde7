"""Word vectors come from a file; a line of it could not be read as numbers and is NaN, for a word that is rare."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class Sentiment(pl.LightningModule):
    def __init__(self, vectors):
        super().__init__()
        self.register_buffer("vectors", vectors)
        self.lstm = nn.LSTM(vectors.shape[1], 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 2)

    def forward(self, words):
        embedded = nn.functional.embedding(words, self.vectors)  # here
        states, _ = self.lstm(embedded)
        return self.head(states.mean(dim=1))

    def training_step(self, batch, batch_idx):
        words, label = batch
        loss = nn.functional.cross_entropy(self(words), label)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def program(seed):
    vectors = torch.randn(40, 6)
    vectors[39] = float("nan")
    words = torch.randint(0, 39, (32, 7))
    words[16 + draw(seed, 8), 3] = 39
    data = [(row, torch.tensor(i % 2)) for i, row in enumerate(words)]
    expected = Expected("weights", "", __file__, tensor="vectors", cause="nonfinite_weights")
    return Program(Sentiment(vectors), loader(data), expected)
