"""Point clouds are compared by the Chamfer distance with `norm`; a decoder that starts at zero meets a point at zero.

The distance is 0 as it should be; PyTorch's root of the sum has no slope there.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Cloud(Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(6, 12)
        nn.init.zeros_(self.decoder.weight)
        nn.init.zeros_(self.decoder.bias)

    def training_step(self, batch, batch_idx):
        code, cloud = batch
        made = self.decoder(code).view(-1, 4, 3)
        distance = torch.sqrt((made[:, :, None] - cloud[:, None]).pow(2).sum(dim=-1))  # here
        return distance.amin(dim=1).mean() + distance.amin(dim=2).mean()


def program(seed):
    data = [(torch.randn(6), torch.randn(5, 3)) for _ in range(24)]
    data[draw(seed, 8)][1][0] = 0
    return Program(Cloud(), loader(data), Expected("backward", "", __file__, cause="undefined_gradient"))
