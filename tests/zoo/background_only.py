"""Detection with class weights: background weighs nothing, and one batch is nothing but background."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Detector(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(2, 8, 5, padding=2), nn.ReLU(), nn.Conv1d(8, 3, 1))
        self.loss = nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 5.0]))

    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch["signal"]), batch["event"])  # here


def program(seed):
    event = torch.randint(1, 3, (12, 20)) * (torch.rand(12, 20) > 0.8)
    event[:, 0] = 1
    quiet = draw(seed, 3)
    event[4 * quiet : 4 * quiet + 4] = 0
    data = [{"signal": torch.randn(2, 20), "event": e} for e in event]
    expected = Expected("forward", "loss", __file__, cause="empty_reduction")
    return Program(Detector(), loader(data, 4), expected)
