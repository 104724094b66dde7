"""An image classifier, one damaged image, and the name of that image.

Trains a small convolutional network on scikit-learn's 8 x 8 digits. The pixels of image 137 are NaN. What you will see:

- NaNEarlyStop skips the update of its batch, once an epoch. Without it the weights would be NaN after the first epoch.
- InputCheck names the image: "64 values that are not finite; sample 6 (dataset index 137)".
- GradNormMonitor is silent: it writes the gradient norms to the log. See `lightning-stability status lightning_logs`.
- The last line: the accuracy on images that the network has not seen, above 90 %.

    python examples/image_classifier.py
"""

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stability import GradNormMonitor, InputCheck, NaNEarlyStop

DAMAGED = 137


class Classifier(LightningModule):
    """Two convolutions with batch norm, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * 2 * 2, 10)),
        )

    def training_step(self, batch, batch_idx):
        images, digits = batch
        loss = nn.functional.cross_entropy(self.network(images), digits)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, digits = batch
        self.log("val_accuracy", (self.network(images).argmax(1) == digits).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def make_data():
    """1,500 images to train on, of which one is damaged, and the other 297 to validate."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    images[DAMAGED] = float("nan")
    train, rest = TensorDataset(images[:1500], labels[:1500]), TensorDataset(images[1500:], labels[1500:])
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(rest, batch_size=297)


if __name__ == "__main__":
    seed_everything(0)
    callbacks = [NaNEarlyStop(), GradNormMonitor(), InputCheck()]
    trainer = Trainer(max_epochs=5, callbacks=callbacks, accelerator="cpu", enable_progress_bar=False)
    trainer.fit(Classifier(), *make_data())
    print(f"Accuracy after {trainer.global_step} steps: {trainer.callback_metrics['val_accuracy']:.1%}")
