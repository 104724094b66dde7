"""How many steps back is far enough: weights of the run's own checkpoints, by bisection."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn

from lightning_stability import FractionalCheckpoint, IncidentReport
from lightning_stability.diagnosis import diagnose
from lightning_stability.diagnosis.earlier import earlier_weights
from lightning_stability.diagnosis.incident import read_incident

BATCHES, BAD = 44, 40


class Growing(pl.LightningModule):
    """Its weight grows by half in each step, and one batch asks for exp(8 * weight): fp32 holds that up to step 22."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (1e-30 * torch.exp(self.weight * batch) - self.weight).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def incident_of_a_run(folder: Path, saves: float) -> Path:
    batches = torch.ones(BATCHES, 4)
    batches[BAD] = 8.0
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=CSVLogger(folder),
        callbacks=[FractionalCheckpoint(saves, save_top_k=-1), IncidentReport(budget_seconds=0)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Growing(), torch.utils.data.DataLoader(batches.flatten(), batch_size=4))
    [found] = folder.rglob("incidents/*")
    return found


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("saves", [1 / BATCHES, 1 / 6])
def test_the_newest_checkpoint_that_is_far_enough_back_is_found(saves, tmp_path):
    incident = incident_of_a_run(tmp_path, saves)
    saved = {step: float(load()["weight"]) for step, load in earlier_weights(read_incident(incident))}
    assert list(saved) == sorted(saved, reverse=True)
    assert max(saved) <= BAD
    enough = max(step for step, weight in saved.items() if math.exp(min(8 * weight, 100)) < 3.4e38)
    report = diagnose(incident)
    tried = [trial for trial in report["counterfactuals"] if "from a checkpoint" in trial["change"]]
    assert tried[0]["change"].startswith(f"the weights of step {min(saved):,},")
    assert len(tried) <= 2 + math.log2(len(saved))
    cures = [int(trial["change"].split()[4].strip(",")) for trial in tried if trial["finite"]]
    assert max(cures) == enough
    first = report["causes"][0]
    assert (first["cause"], first["tensor"]) == ("divergence", "weight")
