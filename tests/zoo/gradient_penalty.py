"""WGAN-GP by hand: the length of the critic's gradient is a root, and where all of its units are off that is 0."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader


class PenalisedGAN(pl.LightningModule):
    def __init__(self, off=1, latent=3):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(latent, 8), nn.ReLU(), nn.Linear(8, 4))
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def penalty(self, real, fake):
        mix = torch.rand(len(real), 1, device=self.device)
        between = (mix * real + (1 - mix) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        return (slope.pow(2).sum(dim=1).sqrt() - 1).pow(2).mean()  # here

    def training_step(self, real, batch_idx):
        of_generator, of_critic = self.optimizers()
        fake = self.generator(torch.randn(len(real), self.hparams.latent, device=self.device))

        loss = self.critic(fake.detach()).mean() - self.critic(real).mean()
        loss = loss + 10 * self.penalty(real, fake.detach())
        of_critic.zero_grad()
        self.manual_backward(loss)
        of_critic.step()

        of_generator.zero_grad()
        self.manual_backward(-self.critic(fake).mean())
        of_generator.step()
        self.log("critic", loss)

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), lr=1e-4, betas=(0.0, 0.9)) for net in (self.generator, self.critic)]


def program(seed):
    module = PenalisedGAN()
    nn.init.constant_(module.critic[0].bias, 1.0)
    nn.init.uniform_(module.critic[0].weight, 0.1, 0.5)
    nn.init.zeros_(module.generator[2].weight)
    data = torch.rand(24, 4)
    data[8 * (1 + draw(seed, 2)) + draw(seed, 8)] = -500.0
    expected = Expected("backward", "", __file__, cause="undefined_gradient")
    return Program(module, loader(list(data)), expected)
