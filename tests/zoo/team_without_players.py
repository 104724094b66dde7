"""The mean of each team's players, 0 for a team without any: `where` throws 0 / 0 away, the backward pass does not."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader, mlp


class TeamPool(nn.Module):
    def forward(self, players, team, teams):
        one_hot = nn.functional.one_hot(team, teams).to(players.dtype)
        total = one_hot.transpose(1, 2) @ players
        count = one_hot.sum(dim=1).unsqueeze(-1)
        return torch.where(count > 0, total / count, torch.zeros_like(total))  # here


class Match(pl.LightningModule):
    def __init__(self, teams=3):
        super().__init__()
        self.save_hyperparameters()
        self.player = mlp(4, 8, 8)
        self.pool = TeamPool()
        self.result = nn.Linear(8 * teams, 2)

    def training_step(self, batch, batch_idx):
        pooled = self.pool(self.player(batch["players"]), batch["team"], self.hparams.teams)
        loss = nn.functional.cross_entropy(self.result(pooled.flatten(1)), batch["won"])
        self.log("train_loss", loss, batch_size=len(pooled))
        return loss

    def configure_optimizers(self):
        return torch.optim.NAdam(self.parameters(), lr=1e-3)


def program(seed):
    data = [{"players": torch.randn(6, 4), "team": torch.arange(6) % 3, "won": torch.tensor(i % 2)} for i in range(24)]
    data[16 + draw(seed, 8)]["team"] = torch.arange(6) % 2
    expected = Expected("backward", "pool", __file__, cause="undefined_gradient")
    return Program(Match(), loader(data), expected)
