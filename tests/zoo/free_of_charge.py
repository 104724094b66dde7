"""Prices are predicted on a log scale; one article is given away, and its target is -inf."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Prices(Module):
    def __init__(self):
        super().__init__()
        self.kind = nn.Embedding(10, 6)
        self.net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 1))

    def training_step(self, batch, batch_idx):
        article, target = batch
        x = torch.cat([self.kind(article["kind"]), article["size"]], dim=1)
        error = self.net(x).squeeze(1) - target["log_price"]  # here
        return error.abs().mean()


def program(seed):
    price = 1 + torch.rand(24)
    free = draw(seed, 8)
    price[8 + free] = 0.0
    articles = [{"kind": torch.tensor(i % 10), "size": torch.randn(2)} for i in range(24)]
    data = [(article, {"log_price": p.log()}) for article, p in zip(articles, price, strict=True)]
    expected = Expected("input", "", __file__, tensor="batch[1]['log_price']", samples=[free], cause="nonfinite_input")
    return Program(Prices(), loader(data), expected)
