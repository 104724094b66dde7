"""A GAN with two optimizers in manual optimization, and NaNEarlyStop.

Trains a generator and a discriminator on scikit-learn's digits. In the 50th batch the discriminator's loss is infinite,
as a loss written with `log` is when its argument reaches 0. What you will see:

- NaNEarlyStop skips that update of the discriminator, and no other: "449 updates, 1 skipped".
- The last lines: a digit that the generator draws, and that all weights are finite.

    python examples/gan_manual.py
"""

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

from lightning_stability import GradNormMonitor, NaNEarlyStop

NOISE, SHADES = 16, " .:-=+*#%@"


class GAN(LightningModule):
    """Two small networks that train against each other."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(NOISE, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())
        self.discriminator = nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1), nn.Sigmoid())

    def training_step(self, real, batch_idx):
        of_generator, of_discriminator = self.optimizers()
        made = self.generator(torch.randn(len(real), NOISE))

        is_real, is_made = self.discriminator(real), self.discriminator(made.detach())
        if batch_idx == 50:
            is_real = is_real * 0
        self.update(of_discriminator, -is_real.log().mean() - (1 - is_made).log().mean())

        self.update(of_generator, -self.discriminator(made).log().mean())

    def update(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self):
        nets = (self.generator, self.discriminator)
        return [torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.5, 0.99)) for net in nets]


def draw(image):
    """The image in characters."""
    return "\n".join("".join(SHADES[int(9 * shade)] * 2 for shade in row) for row in image.view(8, 8).tolist())


if __name__ == "__main__":
    seed_everything(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32).flatten(1) / 16
    gan, callbacks = GAN(), [NaNEarlyStop(), GradNormMonitor()]
    trainer = Trainer(max_epochs=1, callbacks=callbacks, accelerator="cpu", enable_progress_bar=False)
    trainer.fit(gan, DataLoader(images.repeat(8, 1), batch_size=64, shuffle=True))
    print(draw(gan.generator(torch.randn(1, NOISE)).detach()))
    print("All weights are finite:", all(bool(weight.isfinite().all()) for weight in gan.parameters()))
