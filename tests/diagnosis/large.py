"""A run whose one layer takes 64 MB; python large.py FOLDER. While its incident is made it may have little more."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_stability import IncidentReport
from tests import runs

WIDTH = 4096
SPARE = 100 * 2**20


def allow(spare: int | None) -> None:
    """Let this process have that many more bytes than now; None for all there are."""
    limit = resource.RLIM_INFINITY
    if spare is not None:
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + spare
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


class Limited(IncidentReport):
    def on_bad_step(self, bad: Any) -> None:
        allow(SPARE)
        super().on_bad_step(bad)
        allow(None)


class Large(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.linear(batch).mean()
        return loss * torch.nan if batch_idx == 1 else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__" and sys.argv[1] == "diagnose":
    from lightning_stability.cli import main

    allow(SPARE)
    sys.exit(main())
elif __name__ == "__main__":
    data = torch.utils.data.DataLoader(list(torch.randn(4, WIDTH)))
    trainer = runs.trainer(pl, callbacks=[Limited(sys.argv[1])], max_epochs=1)
    trainer.fit(Large(), data)
    print("steps:", trainer.global_step)
