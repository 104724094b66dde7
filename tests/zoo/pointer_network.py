"""A pointer net may not visit a city twice; one tour is shorter than the others, and at its end nothing is left."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader


class Pointer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, state, cities, visited):
        scores = (self.key(cities) @ self.query(state).unsqueeze(-1)).squeeze(-1)
        return scores.masked_fill(visited, float("-inf")).log_softmax(dim=-1)  # here


class Tours(pl.LightningModule):
    def __init__(self, width=16):
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Linear(2, width)
        self.cell = nn.GRUCell(width, width)
        self.pointer = Pointer(width)

    def training_step(self, batch, batch_idx):
        cities = self.embed(batch["cities"])
        visited = ~batch["exists"]
        state, loss = cities.mean(dim=1), 0.0
        for stop in batch["tour"].unbind(dim=1):
            chances = self.pointer(state, cities, visited)
            loss = loss - chances.gather(1, stop.unsqueeze(1)).mean()
            state = self.cell(cities[torch.arange(len(stop)), stop], state)
            visited = visited.scatter(1, stop.unsqueeze(1), True)
        return loss / batch["tour"].shape[1]

    def configure_optimizers(self):
        return torch.optim.RMSprop(self.parameters(), lr=1e-3)


def program(seed):
    data = [
        {"cities": torch.rand(5, 2), "exists": torch.ones(5, dtype=torch.bool), "tour": torch.randperm(5)}
        for _ in range(24)
    ]
    short = draw(seed, 8)
    data[8 + short]["exists"][4] = False
    data[8 + short]["tour"] = torch.tensor([0, 1, 2, 3, 0])
    expected = Expected("forward", "pointer", __file__, samples=[short], cause="masked_attention")
    return Program(Tours(), loader(data), expected)
