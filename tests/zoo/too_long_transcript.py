"""Speech: one transcript has more letters than the net has frames, no alignment exists, and the loss is inf."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Recognizer(Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 12, 4, stride=4)
        self.rnn = nn.GRU(12, 12, batch_first=True)
        self.letters = nn.Linear(12, 6)
        self.loss = nn.CTCLoss()

    def training_step(self, batch, batch_idx):
        sound, text, length = batch
        hidden, _ = self.rnn(self.conv(sound).transpose(1, 2))
        scores = self.letters(hidden).log_softmax(dim=-1).transpose(0, 1)
        frames = torch.full((len(sound),), len(scores))
        return self.loss(scores, text, frames, length)  # here


def program(seed):
    length = torch.randint(2, 5, (24,))
    length[16 + draw(seed, 8)] = 11  # of 40 / 4 = 10 frames
    data = [(torch.randn(4, 40), torch.arange(12) % 5 + 1, n) for n in length]
    expected = Expected("forward", "loss", __file__, cause="undefined_operation")
    return Program(Recognizer(), loader(data), expected)
