"""chemprop: message passing on molecules, `lightning.pytorch`, a schedule by step."""

from __future__ import annotations

from typing import Any

import torch
from chemprop import data, models, nn
from lightning import pytorch as pl

from tests.field.fit import spoiled, trainer_options


def fit(folder: str, callbacks: list[Any], bad: bool) -> tuple[Any, Any]:
    """Predict the length of a chain."""
    chains = ["C" * length + end for length in range(1, 17) for end in "ON"]
    dataset = data.MoleculeDataset([data.MoleculeDatapoint.from_smi(chain, [float(len(chain))]) for chain in chains])
    train = data.build_dataloader(dataset, batch_size=8, seed=0, num_workers=0)
    parts = nn.BondMessagePassing(d_h=16, depth=2), nn.MeanAggregation(), nn.RegressionFFN(input_dim=16, hidden_dim=16)
    module = models.MPNN(*parts, batch_norm=True, warmup_epochs=1)
    trainer = pl.Trainer(**trainer_options(folder, callbacks))
    validation = data.build_dataloader(dataset, batch_size=8, shuffle=False, num_workers=0)
    trainer.fit(module, spoiled(train, _spoil if bad else None), validation)
    return trainer, module


def _spoil(batch: Any) -> None:
    batch.bmg.V[3, 0] = torch.nan
