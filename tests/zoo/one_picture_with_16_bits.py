"""One picture of the data set has 16 bits a pixel, where the others have 8: divided by 255, it reaches 257."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader


class Contrast(nn.Module):
    """Local contrast by a fourth power."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)

    def forward(self, picture):
        edges = self.conv(picture)
        return (edges * edges) * (edges * edges)  # here


class Pictures(Module):
    def __init__(self):
        super().__init__()
        self.contrast = Contrast()
        self.head = nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        hidden = self.contrast(batch["picture"]).mean(dim=(2, 3))
        return nn.functional.cross_entropy(self.head(hidden), batch["label"])


def program(seed):
    picture = torch.randint(0, 256, (24, 1, 8, 8)).float() / 255
    odd = draw(seed, 8)
    picture[16 + odd] *= 257
    data = [{"picture": p, "label": torch.tensor(i % 2)} for i, p in enumerate(picture)]
    expected = Expected(
        "forward",
        "contrast",
        __file__,
        samples=[odd],
        cause="extreme_sample",
        cause_tensor="batch['picture']",
    )
    return Program(Pictures(), loader(data), expected, precision="16-mixed")
