"""A Wasserstein GAN whose critic's weights are neither clipped nor penalised: its score has no bound and grows."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class WassersteinGAN(pl.LightningModule):
    def __init__(self, latent=4, width=8, lr=0.5):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(latent, width), nn.Tanh(), nn.Linear(width, 6))
        self.critic = nn.Sequential(nn.Linear(6, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))

    def training_step(self, real, batch_idx):
        of_generator, of_critic = self.optimizers()
        noise = torch.randn(len(real), self.hparams.latent, device=self.device)

        self.toggle_optimizer(of_critic)
        distance = self.critic(self.generator(noise).detach()).mean() - self.critic(real).mean()  # here
        of_critic.zero_grad()
        self.manual_backward(distance)
        of_critic.step()
        self.untoggle_optimizer(of_critic)

        if batch_idx % 5 == 0:
            self.toggle_optimizer(of_generator)
            loss = -self.critic(self.generator(noise)).mean()
            of_generator.zero_grad()
            self.manual_backward(loss)
            of_generator.step()
            self.untoggle_optimizer(of_generator)
        self.log("distance", distance)

    def configure_optimizers(self):
        lr = self.hparams.lr
        return torch.optim.SGD(self.generator.parameters(), lr=lr), torch.optim.SGD(self.critic.parameters(), lr=lr)


def program(seed):
    data = list(3 + torch.randn(4000, 6))
    every = tuple(f"critic.{part}.{kind}" for part in (0, 2) for kind in ("weight", "bias"))
    expected = Expected(
        "forward",
        "critic.2",
        __file__,
        cause="divergence",
        cause_module=("critic.0", "critic.2", ""),
        cause_tensor=every,
    )
    return Program(WassersteinGAN(width=6 + draw(seed, 6)), loader(data), expected)
