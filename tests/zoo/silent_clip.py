"""The data set divides each clip by its own deviation, in numpy; one of the clips is silent: 0 / 0, before the net."""

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Clips(Dataset):
    def __init__(self, clips):
        self.clips = clips

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        clip = self.clips[index]
        with np.errstate(invalid="ignore"):
            return {"sound": ((clip - clip.mean()) / clip.std()).astype("float32"), "word": index % 3}


class Keyword(Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(1, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        hidden, _ = self.rnn(batch["sound"].unsqueeze(-1))  # here
        return nn.functional.cross_entropy(self.head(hidden[:, -1]), batch["word"])


def program(seed):
    clips = np.random.default_rng(seed).normal(size=(24, 12))
    silent = draw(seed, 8)
    clips[16 + silent] = 0.0
    expected = Expected("input", "rnn", __file__, tensor="batch['sound']", samples=[silent], cause="nonfinite_input")
    return Program(Keyword(), loader(Clips(torch.from_numpy(clips).numpy())), expected)
