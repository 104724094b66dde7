"""A run that is killed by SIGKILL in the middle of an epoch, and resumed as if nothing had happened.

Trains on scikit-learn's digits, with shuffling and dropout, in a process of its own. After 40 steps that process is
killed. What you will see:

- The run is resumed from its last checkpoint, at step 36: FractionalCheckpoint saves each quarter of an epoch.
- "resumed exactly: 4 of 4 steps bitwise identical": the steps that the killed run had taken after the checkpoint were
  repeated to the bit.
- The last line: the weights at the end are those of a run that was never killed.

    python examples/kill_and_resume.py
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stability import FractionalCheckpoint
from lightning_stability.checkpointing import last_good_checkpoint


class Classifier(LightningModule):
    """Two layers with dropout between them."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        images, digits = batch
        return nn.functional.cross_entropy(self.network(images), digits)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class WaitAfter40(Callback):
    """Says that 40 steps are done, and waits for the end."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 40:
            print("40 steps", flush=True)
            time.sleep(600)


def train(folder, ckpt_path=None, callbacks=()):
    """Train three epochs of 24 steps; return the weights."""
    seed_everything(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(digits.target))
    save = FractionalCheckpoint(every_n_epochs=0.25, dirpath=folder)
    trainer = Trainer(max_epochs=3, callbacks=[save, *callbacks], accelerator="cpu", enable_progress_bar=False)
    model = Classifier()
    trainer.fit(model, DataLoader(data, batch_size=75, shuffle=True), ckpt_path=ckpt_path)
    return torch.cat([weight.flatten() for weight in model.parameters()])


if __name__ == "__main__":
    if len(sys.argv) > 1:  # the process that is killed
        train(sys.argv[1], callbacks=[WaitAfter40()])
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen([sys.executable, __file__, f"{folder}/killed"], stdout=subprocess.PIPE, text=True)
        any(line == "40 steps\n" for line in child.stdout)  # reads until then
        child.kill()
        print(f"The process was ended by signal {-child.wait()}")
        newest = last_good_checkpoint(f"{folder}/killed")
        print(f"Resuming from {Path(newest).name}")
        resumed = train(f"{folder}/killed", ckpt_path=newest)
        print("The weights of a run that was never killed:", torch.equal(resumed, train(f"{folder}/whole")))
