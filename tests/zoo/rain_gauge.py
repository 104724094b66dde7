"""Rain is predicted as a ratio to the month's mean; one station had none in that month, and its target is 1 / 0."""

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tests.zoo.program import Expected, Program, draw

held_out = True


class Stations(Dataset):
    def __init__(self, rain, monthly):
        self.rain, self.monthly = rain, monthly

    def __len__(self):
        return len(self.rain)

    def __getitem__(self, index):
        with np.errstate(divide="ignore"):
            ratio = np.float32(1 + self.rain[index].mean()) / self.monthly[index]
        return {"days": self.rain[index], "labels": {"ratio": ratio, "wet": np.int64(self.rain[index, -1] > 1)}}


class Forecast(pl.LightningModule):
    def __init__(self, hidden=16):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.GRU(1, hidden, batch_first=True)
        self.ratio, self.wet = nn.Linear(hidden, 1), nn.Linear(hidden, 2)

    def training_step(self, batch, batch_idx):
        hidden = self.encoder(batch["days"].unsqueeze(-1))[0][:, -1]
        labels = batch["labels"]
        wet = nn.functional.cross_entropy(self.wet(hidden), labels["wet"])
        ratio = nn.functional.smooth_l1_loss(self.ratio(hidden).squeeze(1), labels["ratio"])  # here
        self.log_dict({"wet": wet, "ratio": ratio})
        return wet + 0.5 * ratio

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def program(seed):
    rng = np.random.default_rng(seed)
    monthly = rng.uniform(1, 3, size=24).astype("float32")
    dry = draw(seed, 8)
    monthly[8 + dry] = 0.0
    data = Stations(rng.gamma(1.0, size=(24, 10)).astype("float32"), monthly)
    expected = Expected(
        "input", "", __file__, tensor="batch['labels']['ratio']", samples=[dry], cause="nonfinite_input"
    )
    return Program(Forecast(), DataLoader(data, batch_size=8), expected)
