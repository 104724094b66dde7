"""Layer normalisation with eps=0, as in an exported net; the embedding of padding is all zeros: 0 * inf is NaN."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Tokens(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(20, width, padding_idx=0)
        self.norm = nn.LayerNorm(width, eps=0.0)

    def forward(self, tokens):
        return self.norm(self.embedding(tokens))  # here


class Exported(Module):
    def __init__(self):
        super().__init__()
        self.tokens = Tokens(8)
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        tokens, label = batch
        _, last = self.rnn(self.tokens(tokens))
        return nn.functional.cross_entropy(self.head(last[0]), label)


def program(seed):
    tokens = torch.randint(1, 20, (24, 5))
    short = draw(seed, 8)
    tokens[8 + short, 3:] = 0
    data = [(row, torch.tensor(i % 2)) for i, row in enumerate(tokens)]
    expected = Expected("forward", "tokens.norm", __file__, samples=[short], cause="undefined_operation")
    return Program(Exported(), loader(data), expected)
