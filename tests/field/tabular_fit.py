"""pytorch-tabular: it makes the Trainer, the LightningModule and the loaders itself, with `pytorch_lightning`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig

from tests.field.fit import spoiled, trainer_options


def fit(folder: str, callbacks: list[Any], bad: bool) -> tuple[Any, Any]:
    """Regress one column on the others."""
    random = np.random.default_rng(0)
    table = pd.DataFrame(random.standard_normal((64, 4)), columns=list("abcd"))
    table["kind"], table["y"] = random.integers(0, 3, 64).astype(str), table.a * 2
    options = trainer_options(folder, callbacks)
    del options["callbacks"], options["accelerator"], options["max_epochs"], options["enable_progress_bar"]
    model = TabularModel(
        data_config=DataConfig(target=["y"], continuous_cols=list("abcd"), categorical_cols=["kind"]),
        model_config=CategoryEmbeddingModelConfig(task="regression", layers="16-8", dropout=0.1),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(
            batch_size=8, max_epochs=2, accelerator="cpu", load_best=False, progress_bar="none",
            checkpoints_path=folder, early_stopping_patience=9, trainer_kwargs=options,
        ),
    )  # fmt: skip
    loaders = model.prepare_dataloader(train=table, validation=table[:16], seed=1)
    if bad:
        make = loaders.train_dataloader
        loaders.train_dataloader = lambda *args: spoiled(make(*args), _spoil)
    module = model.prepare_model(loaders)
    model.train(module, loaders, callbacks=callbacks)
    return model.trainer, module


def _spoil(batch: Any) -> None:
    batch["continuous"][1, 0] = torch.nan
