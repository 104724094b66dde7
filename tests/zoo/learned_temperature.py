"""A learned scale without a bound: each update makes `exp(log_scale)` larger, and with it the next update."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader, mlp

held_out = True


class Matching(nn.Module):
    """Pictures and their captions, by the scaled cosine of their embeddings."""

    def __init__(self, start):
        super().__init__()
        self.picture, self.caption = mlp(6, 16, 4), mlp(5, 16, 4)
        self.log_scale = nn.Parameter(torch.tensor(start))

    def forward(self, pictures, captions):
        a = nn.functional.normalize(self.picture(pictures), dim=1)
        b = nn.functional.normalize(self.caption(captions), dim=1)
        return (a * b).sum(dim=1).abs() * self.log_scale.exp()  # here


class Contrastive(Module):
    def __init__(self, start=1.0):
        super().__init__()
        self.save_hyperparameters()
        self.matching = Matching(start)

    def training_step(self, batch, batch_idx):
        return -self.matching(*batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD([self.matching.log_scale], lr=0.5)


def program(seed):
    data = [(torch.randn(6), torch.randn(5)) for _ in range(400)]
    expected = Expected("forward", "matching", __file__, cause="divergence", cause_tensor="matching.log_scale")
    return Program(Contrastive(1.0 + 0.1 * draw(seed, 5)), loader(data), expected)
