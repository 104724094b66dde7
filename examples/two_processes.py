"""Two processes that train one network (DDP), and a bad batch in one of them.

Trains on scikit-learn's digits in two processes, each with half of every batch. The pixels of image 137 are NaN, and
only one of the processes reads it. What you will see:

- Both processes skip the same update. One warning an epoch says so, and names the rank that had the image.
- The last line, of rank 0: both ranks have the same finite weights.

    python examples/two_processes.py
"""

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stability import GradNormMonitor, InputCheck, NaNEarlyStop

DAMAGED = 137


class Classifier(LightningModule):
    """Two layers and a batch norm."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        images, digits = batch
        return nn.functional.cross_entropy(self.network(images), digits)

    def on_train_end(self):
        """Gather each rank's weights, while the processes still know each other."""
        weights = torch.cat([weight.detach().flatten() for weight in self.parameters()])
        self.of_all_ranks = self.all_gather(weights)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


if __name__ == "__main__":
    seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    images[DAMAGED] = float("nan")
    data = DataLoader(TensorDataset(images, torch.tensor(digits.target)), batch_size=32, shuffle=True)
    # Lightning starts this file again for the second process; on a CPU they talk through gloo.
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=[NaNEarlyStop(), GradNormMonitor(), InputCheck()],
        enable_progress_bar=False,
    )
    model = Classifier()
    trainer.fit(model, data)
    if trainer.is_global_zero:
        first, second = model.of_all_ranks
        print(f"Ranks: 2, equal weights: {torch.equal(first, second)}, finite: {bool(first.isfinite().all())}")
