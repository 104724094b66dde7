"""Two optimizers by hand: the discriminator is so sure that 1 - D(fake) is 0, and the loss takes its logarithm."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader, mlp


class GAN(Module):
    def __init__(self, sure_of=0):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = mlp(2, 8, 4)
        self.discriminator = mlp(4, 8, 1)

    def judge(self, samples):
        return torch.sigmoid(self.discriminator(samples))

    def training_step(self, batch, batch_idx):
        of_generator, of_discriminator = self.optimizers()
        fake = self.generator(torch.randn(len(batch), 2))

        self.toggle_optimizer(of_discriminator)
        real, made = self.judge(batch), self.judge(fake.detach())
        loss = nn.functional.binary_cross_entropy(real, torch.ones_like(real)) + made.mean()
        of_discriminator.zero_grad()
        self.manual_backward(loss)
        of_discriminator.step()
        self.untoggle_optimizer(of_discriminator)

        if batch_idx == self.hparams.sure_of:  # stands for training that went too far
            fake = fake + 1000 * self.discriminator[0].weight.detach().sum(dim=0)
        self.toggle_optimizer(of_generator)
        loss = torch.log(1 - self.judge(fake)).mean()  # here
        of_generator.zero_grad()
        self.manual_backward(loss)
        of_generator.step()
        self.untoggle_optimizer(of_generator)

    def configure_optimizers(self):
        return (
            torch.optim.Adam(self.generator.parameters(), lr=1e-3),
            torch.optim.Adam(self.discriminator.parameters(), lr=1e-3),
        )


def program(seed):
    module = GAN(sure_of=draw(seed, 3))
    nn.init.ones_(module.discriminator[2].weight)
    expected = Expected("forward", "", __file__, cause="undefined_operation")
    return Program(module, loader(list(torch.randn(24, 4))), expected)
