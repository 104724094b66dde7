"""A frozen backbone with batch normalisation: one running variance in the file is NaN, as an fp16 run had left it."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))  # here
        return x.mean(dim=(2, 3))


class Frozen(Module):
    def __init__(self):
        super().__init__()
        self.backbone = Backbone().requires_grad_(False).eval()
        self.head = nn.Linear(3, 2)

    def training_step(self, batch, batch_idx):
        picture, label = batch
        return nn.functional.cross_entropy(self.head(self.backbone(picture)), label)


def program(seed):
    place = draw(seed, 3)
    file = Backbone().state_dict()
    file[f"norms.{place}.running_var"][1] = float("nan")
    module = Frozen()
    module.backbone.load_state_dict(file)
    data = [(torch.randn(3, 6, 6), torch.tensor(i % 2)) for i in range(16)]
    name = f"backbone.norms.{place}"
    expected = Expected("weights", name, __file__, tensor=f"{name}.running_var", cause="nonfinite_weights")
    return Program(module, loader(data), expected)
