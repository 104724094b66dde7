"""A small language model, two bursts of bad batches, and SpikeRecovery.

Trains a byte-level transformer on the source text of Python's standard library, twice. At steps 100 to 102 and 150 to
152 the batches hold compressed data instead of text, as a broken file in a data set would. What you will see:

- In the first run nobody looks, and the model learns from these batches.
- In the second run SpikeRecovery skips them: "the loss was ... (usual ..., limit ...)".
- The last line: the loss of both models on text that they have not seen. The second one is lower.

    python examples/language_model_spike.py
"""

import sysconfig
import zlib
from pathlib import Path

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader

from lightning_stability import SpikeRecovery

STEPS, BATCH, LENGTH, BAD = 160, 16, 64, (100, 101, 102, 150, 151, 152)


class LanguageModel(LightningModule):
    """Two transformer layers that predict the next byte."""

    def __init__(self):
        super().__init__()
        self.byte, self.place = nn.Embedding(256, 64), nn.Parameter(torch.zeros(LENGTH, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(64, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def loss(self, text):
        hidden = self.layers(self.byte(text[:, :-1]) + self.place, mask=self.mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), text[:, 1:].flatten())

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def windows(content):
    """Bytes, cut into pieces of one more than the model reads."""
    return torch.tensor(list(content[: len(content) // (LENGTH + 1) * (LENGTH + 1)])).view(-1, LENGTH + 1)


def make_data():
    """Text to train on, in a fixed order with the bad batches in it, and other text to validate."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    content = b"".join(path.read_bytes() for path in files)[:1_000_000]
    text, bad = windows(content), windows(zlib.compress(content))
    text = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(0))]
    train, rest = text[: STEPS * BATCH].clone(), text[STEPS * BATCH :][: 20 * BATCH]
    for number, step in enumerate(BAD):
        train[step * BATCH : (step + 1) * BATCH] = bad[number * BATCH : (number + 1) * BATCH]
    return DataLoader(train, batch_size=BATCH), DataLoader(rest, batch_size=BATCH)


if __name__ == "__main__":
    losses = []
    for callbacks in ([], [SpikeRecovery()]):
        seed_everything(0)
        trainer = Trainer(max_epochs=1, callbacks=callbacks, accelerator="cpu", enable_progress_bar=False)
        trainer.fit(LanguageModel(), *make_data())
        losses.append(float(trainer.callback_metrics["val_loss"]))
    print(f"Loss on other text: {losses[0]:.3f}; with {callbacks[0].spikes} steps skipped: {losses[1]:.3f}")
