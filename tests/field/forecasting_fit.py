"""pytorch-forecasting: a temporal fusion transformer with its own metrics and batches, `lightning.pytorch`."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.metrics import MAE

from tests.field.fit import spoiled, trainer_options


def fit(folder: str, callbacks: list[Any], bad: bool) -> tuple[Any, Any]:
    """Predict two steps of random walks."""
    walks = np.random.default_rng(0).standard_normal((3, 40)).cumsum(1).reshape(-1)
    table = pd.DataFrame({"time": np.tile(np.arange(40), 3), "group": np.repeat(list("abc"), 40), "y": walks})
    dataset = TimeSeriesDataSet(
        table, time_idx="time", target="y", group_ids=["group"], max_encoder_length=8, max_prediction_length=2,
        static_categoricals=["group"], time_varying_known_reals=["time"], time_varying_unknown_reals=["y"],
    )  # fmt: skip
    module = TemporalFusionTransformer.from_dataset(
        dataset, hidden_size=4, attention_head_size=1, hidden_continuous_size=4, loss=MAE(), log_interval=-1
    )
    options = {"limit_train_batches": 6, "limit_val_batches": 2, "gradient_clip_val": 0.1}
    trainer = pl.Trainer(**trainer_options(folder, callbacks), **options)
    train = dataset.to_dataloader(train=True, batch_size=16, num_workers=0)
    trainer.fit(
        module,
        spoiled(train, _spoil if bad else None),
        dataset.to_dataloader(train=False, batch_size=16, num_workers=0),
    )
    return trainer, module


def _spoil(batch: Any) -> None:
    batch[0]["encoder_cont"][1, 0, 0] = torch.nan
