"""Modules that step their optimizers by hand, in the ways that people do; one batch of each run is bad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.zoo.program import Module, mlp

BAD = 4


def spoilt(loss: Tensor, batch_idx: int) -> Tensor:
    return (loss - loss.detach()).sqrt() + loss if batch_idx == BAD else loss  # here


class Part(nn.Module):
    """What makes a replay that is not exact another loss: statistics, dropout."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(into, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), mlp(8, out))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ByHand(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = Part(2, 4), Part(4, 1)

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.Adam(part.parameters(), lr=1e-2) for part in (self.generator, self.critic)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizer, 2) for optimizer in optimizers]

    def critic_loss(self, batch: Tensor, made: Tensor) -> Tensor:
        return self.critic(made).mean() - self.critic(batch).mean()


class TwoOptimizers(ByHand):
    """The critic steps before the generator's loss is made; each is toggled."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        of_generator, of_critic = self.optimizers()
        made = self.generator(torch.randn(len(batch), 2))
        self.toggle_optimizer(of_critic)
        of_critic.zero_grad()
        self.manual_backward(self.critic_loss(batch, made.detach()))
        of_critic.step()
        self.untoggle_optimizer(of_critic)

        self.toggle_optimizer(of_generator)
        of_generator.zero_grad()
        self.manual_backward(spoilt(-self.critic(made).mean(), batch_idx))
        of_generator.step()
        self.untoggle_optimizer(of_generator)
        for scheduler in self.lr_schedulers():
            scheduler.step()


class SeveralCriticSteps(ByHand):
    """The critic steps three times in a batch; its second step is bad."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        of_generator, of_critic = self.optimizers()
        for turn in range(3):
            with of_critic.toggle_model():
                loss = self.critic_loss(batch, self.generator(torch.randn(len(batch), 2)).detach())
                of_critic.zero_grad()
                self.manual_backward(spoilt(loss, batch_idx if turn == 1 else -1))
                of_critic.step()
        of_generator.zero_grad()
        self.manual_backward(-self.critic(self.generator(torch.randn(len(batch), 2))).mean())
        of_generator.step()


class Closures(ByHand):
    """Each step is given a closure."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        of_generator, of_critic = self.optimizers()

        def of_the_critic() -> Tensor:
            loss = self.critic_loss(batch, self.generator(torch.randn(len(batch), 2)).detach())
            of_critic.zero_grad()
            self.manual_backward(loss)
            return loss

        def of_the_generator() -> Tensor:
            loss = spoilt(-self.critic(self.generator(torch.randn(len(batch), 2))).mean(), batch_idx)
            of_generator.zero_grad()
            self.manual_backward(loss)
            return loss

        of_critic.step(closure=of_the_critic)
        of_generator.step(closure=of_the_generator)


class Accumulating(ByHand):
    """Gradients of three batches, and two losses each; the bad batch is the second of its window."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        of_generator, of_critic = self.optimizers()
        made = self.generator(torch.randn(len(batch), 2))
        self.manual_backward(self.critic_loss(batch, made.detach()) / 3)
        self.manual_backward(spoilt(-self.critic(made).mean() / 3, batch_idx))
        if batch_idx % 3 == 2:
            for optimizer in (of_generator, of_critic):
                self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
                optimizer.step()
                optimizer.zero_grad()


class PlainBackward(ByHand):
    """Neither `manual_backward` nor Lightning's optimizers."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        of_generator, of_critic = self.optimizers(use_pl_optimizer=False)
        made = self.generator(torch.randn(len(batch), 2))
        of_critic.zero_grad()
        self.critic_loss(batch, made.detach()).backward()
        of_critic.step()
        of_generator.zero_grad()
        spoilt(-self.critic(made).mean(), batch_idx).backward()
        of_generator.step()


def data() -> DataLoader[Any]:
    return DataLoader(list(torch.randn(72, 4, generator=torch.Generator().manual_seed(1))), batch_size=8)
