"""A recommender trained by Adagrad with eps=0: an article that nobody has bought yet gets an update of 0 / 0."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class Recommender(pl.LightningModule):
    def __init__(self, users=12, articles=30, width=4):
        super().__init__()
        self.save_hyperparameters()
        self.user = nn.Embedding(users, width)
        self.article = nn.Embedding(articles, width)

    def training_step(self, batch, batch_idx):
        rating = (self.user(batch["user"]) * self.article(batch["article"])).sum(dim=1)
        return nn.functional.mse_loss(rating, batch["rating"])

    def configure_optimizers(self):
        return torch.optim.Adagrad(self.parameters(), lr=0.05, eps=0.0)  # here


def program(seed):
    users = torch.arange(24) % 12  # each user is in every batch
    data = [
        {"user": user, "article": torch.randint(5 + draw(seed, 10), ()), "rating": torch.randn(())} for user in users
    ]
    expected = Expected(
        "optimizer", "article", __file__, tensor="article.weight", cause="optimizer_update", option="eps"
    )
    return Program(Recommender(), loader(data, 12), expected)
