"""A picture looks at its caption through `nn.MultiheadAttention`; one caption is empty, and every key of it masked."""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, draw, loader

held_out = True


class CrossAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, patches, words, absent):
        looked_up, _ = self.attention(patches, words, words, key_padding_mask=absent)  # here
        return self.norm(patches + looked_up)


class Captioned(Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(30, 8)
        self.layers = nn.ModuleList(CrossAttention(8) for _ in range(2))
        self.head = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        patches, words = batch["patches"], self.words(batch["caption"])
        absent = torch.arange(words.shape[1]) >= batch["length"].unsqueeze(1)
        for layer in self.layers:
            patches = layer(patches, words, absent)
        return self.head(patches.mean(dim=1)).pow(2).mean()


def program(seed):
    length = torch.randint(1, 7, (24,))
    empty = draw(seed, 8)
    length[8 + empty] = 0
    data = [{"patches": torch.randn(4, 8), "caption": torch.randint(30, (6,)), "length": n} for n in length]
    expected = Expected("forward", "layers.0.attention", __file__, samples=[empty], cause="masked_attention")
    return Program(Captioned(), loader(data), expected)
