"""Learning to rank: grades are divided by their sum to a distribution, and one query has no relevant document."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader, mlp


class ListNet(nn.Module):
    def forward(self, scores, grades):
        wanted = grades / grades.sum(dim=1, keepdim=True)  # here
        return -(wanted * scores.log_softmax(dim=1)).sum(dim=1).mean()


class Ranker(pl.LightningModule):
    def __init__(self, features=5):
        super().__init__()
        self.save_hyperparameters()
        self.score = mlp(features, 16, 1)
        self.criterion = ListNet()

    def training_step(self, batch, batch_idx):
        scores = self.score(batch["documents"]).squeeze(-1)
        return self.criterion(scores, batch["grades"])

    def configure_optimizers(self):
        return torch.optim.Adagrad(self.parameters(), lr=0.01)


def program(seed):
    data = [{"documents": torch.randn(7, 5), "grades": torch.randint(1, 4, (7,)).float()} for _ in range(32)]
    empty = draw(seed, 8)
    data[16 + empty]["grades"].zero_()
    expected = Expected("forward", "criterion", __file__, samples=[empty], cause="undefined_operation")
    return Program(Ranker(), loader(data), expected)
