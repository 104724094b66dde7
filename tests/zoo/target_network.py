"""A target net is an average of the net's weights over the steps so far; before the first step it divides by 0."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader, mlp

held_out = True


class DeepQ(pl.LightningModule):
    def __init__(self, states=4, actions=3, average_from=3):
        super().__init__()
        self.save_hyperparameters()
        self.net = mlp(states, 16, actions)
        self.target = mlp(states, 16, actions).requires_grad_(False)

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx < self.hparams.average_from:
            return
        steps = torch.tensor(float(batch_idx - self.hparams.average_from))
        for mean, new in zip(self.target.parameters(), self.net.parameters(), strict=True):
            mean.data.add_((new.data - mean.data) / steps)  # here

    def training_step(self, batch, batch_idx):
        state, action, reward, following = batch
        best = self.target(following).max(dim=1).values
        value = self.net(state).gather(1, action.unsqueeze(1)).squeeze(1)
        return nn.functional.smooth_l1_loss(value, reward + 0.99 * best)

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), lr=1e-3)


def program(seed):
    data = [(torch.randn(4), torch.tensor(i % 3), torch.rand(()), torch.randn(4)) for i in range(64)]
    tensors = tuple(f"target.{part}.{kind}" for part in (0, 2) for kind in ("weight", "bias"))
    expected = Expected(
        "weights", "", __file__, tensor="target.0.weight", cause="nonfinite_weights", cause_tensor=tensors
    )
    return Program(DeepQ(average_from=2 + draw(seed, 4)), loader(data), expected)
