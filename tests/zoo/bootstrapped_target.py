"""Q-learning whose discount was typed as 9.9 instead of 0.99: the net runs after its own growing promises."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Agent(Module):
    def __init__(self, discount=9.9):
        super().__init__()
        self.save_hyperparameters()
        self.value = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        state, reward, following = batch
        promised = reward + self.hparams.discount * self.value(following).detach().amax(dim=1)
        return nn.functional.mse_loss(self.value(state).amax(dim=1), promised)  # here

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def program(seed):
    state = 1 + torch.rand(800, 4)
    data = list(zip(state, torch.rand(800), state + 0.1, strict=True))
    expected = Expected("forward", "", __file__, cause="divergence", cause_tensor="value.weight")
    return Program(Agent(9.9 + draw(seed, 3)), loader(data), expected)
