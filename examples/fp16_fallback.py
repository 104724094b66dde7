"""fp16, an image that is too bright for it, and PrecisionFallback.

Trains on scikit-learn's digits in fp16. Image 137 is 100,000 times too bright, as in a file of another unit: fp16 ends
at 65,504. What you will see:

- PrecisionFallback trains its batch again in fp32: "The batch has been trained in 32-true, and so will be the rest".
- NaNEarlyStop has nothing to do: "120 updates, 0 skipped".
- The last line: the precision that the run ended with, and the accuracy.

Lightning turns `precision="16-mixed"` into bf16 on a CPU. With the plugin below it is real fp16, on a CPU too. On a GPU
write `Trainer(precision="16-mixed", callbacks=[PrecisionFallback()])`.

    python examples/fp16_fallback.py
"""

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.plugins import MixedPrecision
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stability import NaNEarlyStop, PrecisionFallback

TOO_BRIGHT = 137


class Classifier(LightningModule):
    """Two layers, and a layer norm between them that makes bright and dark images alike."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        images, digits = batch
        return nn.functional.cross_entropy(self.network(images), digits)

    def validation_step(self, batch, batch_idx):
        images, digits = batch
        self.log("val_accuracy", (self.network(images).argmax(1) == digits).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


def make_data():
    """1,500 images to train on, of which one is too bright, and the other 297 to validate."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(digits.target)
    images[TOO_BRIGHT] *= 1e5
    train, rest = TensorDataset(images[:1500], labels[:1500]), TensorDataset(images[1500:], labels[1500:])
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(rest, batch_size=297)


if __name__ == "__main__":
    seed_everything(0)
    trainer = Trainer(
        max_epochs=5,
        plugins=[MixedPrecision("16-mixed", "cpu")],
        callbacks=[PrecisionFallback(), NaNEarlyStop()],
        accelerator="cpu",
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(), *make_data())
    print(f"Ended in {trainer.precision}, accuracy {trainer.callback_metrics['val_accuracy']:.1%}")
