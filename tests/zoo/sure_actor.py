"""Actor and critic with two optimizers by hand; the actor's deviation is a ReLU, which is 0, and is divided by."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader, mlp

held_out = True


class Actor(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = mlp(4, 12, 12)
        self.mean, self.deviation = nn.Linear(12, 2), nn.Linear(12, 2)
        nn.init.constant_(self.deviation.bias, 2.0)

    def log_probability(self, state, action):
        hidden = self.trunk(state)
        deviation = torch.relu(self.deviation(hidden))
        z = (action - self.mean(hidden)) / deviation  # here
        return (-0.5 * z.pow(2) - torch.log(deviation + 1e-6)).sum(dim=1)


class ActorCritic(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.actor, self.critic = Actor(), mlp(4, 12, 1)

    def training_step(self, batch, batch_idx):
        state, action, reward = batch
        of_actor, of_critic = self.optimizers()
        value = self.critic(state).squeeze(1)

        of_critic.zero_grad()
        self.manual_backward(nn.functional.mse_loss(value, reward))
        of_critic.step()

        advantage = reward - value.detach()
        of_actor.zero_grad()
        self.manual_backward(-(self.actor.log_probability(state, action) * advantage).mean())
        of_actor.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (self.actor, self.critic)]


def program(seed):
    module = ActorCritic()
    module.actor.deviation.bias.data[draw(seed, 2)] = -5.0
    data = [(torch.randn(4), torch.randn(2), torch.randn(())) for _ in range(24)]
    return Program(module, loader(data), Expected("forward", "actor", __file__, cause="undefined_operation"))
