"""The TUAB probe's schedules, metrics and EarlyStopping go on exactly after a resume inside an epoch."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping

from lightning_stability import FractionalCheckpoint
from lightning_stability.tuab import EEGPTProbe, TUABDataModule


class Rows(pl.loggers.Logger):
    name = "rows"
    version = "0"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[str] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(json.dumps([step, metrics]))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def fit(corpus: Path, folder: Path, cache: Path, scheduler: str, ckpt_path: Path | None = None) -> Any:
    pl.seed_everything(0 if ckpt_path is None else 1, verbose=False)
    stopping = EarlyStopping("val_auroc", mode="max", patience=2)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        accumulate_grad_batches=2,
        val_check_interval=0.5,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        logger=Rows(),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FractionalCheckpoint(0.3, dirpath=folder, save_top_k=-1, monitor="val_auroc"), stopping],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = EEGPTProbe(scheduler=scheduler)
        data = TUABDataModule(root=str(corpus), cache_dir=str(cache), batch_size=8)
        trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer, stopping


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["cosine", "onecycle"])
def test_goes_on_exactly_over_a_resume_inside_an_epoch(corpus: Path, tmp_path: Path, scheduler: str) -> None:
    reference, stopping = fit(corpus, tmp_path / "a", tmp_path / "cache", scheduler)
    paths = sorted((tmp_path / "a").glob("epoch=*.ckpt"))
    assert len(paths) >= 5
    for index, path in enumerate(paths[:-1]):
        resumed, again = fit(corpus, tmp_path / str(index), tmp_path / "cache", scheduler, path)
        for ours, theirs in zip(
            resumed.lightning_module.state_dict().values(),
            reference.lightning_module.state_dict().values(),
            strict=True,
        ):
            assert torch.equal(ours, theirs)
        rows = resumed.logger.rows
        assert rows == reference.logger.rows[-len(rows) :]
        assert again.state_dict() == stopping.state_dict()
        assert resumed.optimizers[0].param_groups[0]["lr"] == reference.optimizers[0].param_groups[0]["lr"]
