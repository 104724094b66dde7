"""Events come with the hours since the last one; one user's file has seconds since 1970 instead. fp16, accumulation."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class EventEmbedding(nn.Module):
    def __init__(self, events, width):
        super().__init__()
        self.event = nn.Embedding(events, width)
        self.elapsed = nn.Linear(1, width)

    def forward(self, events, hours):
        return self.event(events) + self.elapsed(hours.unsqueeze(-1))  # here


class NextEvent(pl.LightningModule):
    def __init__(self, width=16, events=10):
        super().__init__()
        self.save_hyperparameters()
        self.embed = EventEmbedding(events, width)
        layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(width, events)

    def training_step(self, batch, batch_idx):
        events, hours, following = batch
        logits = self.head(self.encoder(self.embed(events, hours))[:, -1])
        loss = nn.functional.cross_entropy(logits, following, label_smoothing=0.1)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def program(seed):
    hours = 5 * torch.rand(32, 6)
    wrong = draw(seed, 8)
    hours[24 + wrong] = 1.7e9 + 3600 * hours[24 + wrong]
    data = [(torch.randint(10, (6,)), row, torch.tensor(i % 10)) for i, row in enumerate(hours)]
    expected = Expected(
        "forward", "embed.elapsed", __file__, samples=[wrong], cause="extreme_sample", cause_tensor="batch[1]"
    )
    options = {"accumulate_grad_batches": 2}
    return Program(NextEvent(), loader(data), expected, precision="16-mixed", options=options)
