"""The TUAB probe's schedules, metrics, samplers and EarlyStopping go on exactly after a resume inside an epoch."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping

from lightning_stability import FractionalCheckpoint
from lightning_stability.checkpointing import last_good_checkpoint
from lightning_stability.tuab import EEGPTProbe, TUABDataModule
from tests import checkpoint_fit as fits
from tests.callbacks.test_fractional_checkpoint import (
    assert_same,
    log,
    ranked,
    result,
    resume_from_all,
    saved,
)
from tests.callbacks.test_fractional_checkpoint import fit as fit_small


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


def fit(corpus: Path, folder: Path, cache: Path, scheduler: str, data: Any, ckpt_path: Path | None = None) -> Any:
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
        module_of_data = TUABDataModule(root=str(corpus), cache_dir=str(cache), batch_size=8, **data)
        trainer.fit(module, module_of_data, ckpt_path=ckpt_path)
    return trainer, stopping


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheduler", "data"),
    [
        ("cosine", {}),
        ("onecycle", {}),
        ("cosine", {"num_workers": 2}),
        ("cosine", {"class_balanced": True, "num_workers": 2}),
    ],
)
def test_goes_on_exactly_over_a_resume_inside_an_epoch(
    corpus: Path, tmp_path: Path, scheduler: str, data: dict[str, Any]
) -> None:
    reference, stopping = fit(corpus, tmp_path / "a", tmp_path / "cache", scheduler, data)
    paths = sorted((tmp_path / "a").glob("epoch=*.ckpt"))
    assert len(paths) >= 4
    for index, path in enumerate(paths[:-1]):
        resumed, again = fit(corpus, tmp_path / str(index), tmp_path / "cache", scheduler, data, path)
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


@pytest.mark.parametrize("workers", [0, 2])
def test_the_balanced_sampler_goes_on_exactly_inside_an_epoch(tmp_path: Path, workers: int) -> None:
    options = {"data": "balanced", "workers": workers, "augment": False, "max_epochs": 2}
    options["checkpoint"] = {"every_n_epochs": 0.4}
    fit_small(tmp_path, **options)
    paths = saved(tmp_path)
    assert len(paths) >= 5
    resume_from_all(paths[1:4:2] if workers else paths, tmp_path, options)


def windows_of_epochs(folder: Path, ranks: int) -> list[list[int]]:
    seen = [result(folder, rank)["seen"] for rank in range(ranks)]
    count = len(seen[0]) // 2
    return [
        [window for rank in seen for batch in rank[epoch * count :][:count] for window in batch] for epoch in range(2)
    ]


def assert_balanced(windows: list[int]) -> None:
    labels, counts = fits.BALANCED_LABELS, np.bincount(windows, minlength=len(fits.BALANCED_LABELS))
    assert [counts[labels == label].sum() for label in (0, 1)] == [28, 28]
    assert sorted(set(counts[labels == 0])) == [0, 1]
    assert sorted(set(counts[labels == 1])) == [1, 2]


@pytest.mark.slow
def test_ranks_share_out_every_balanced_epoch_and_go_on_exactly_when_killed(
    tmp_path: Path,
    processes: fits.Fits,
) -> None:
    run = ranked(processes)
    options: dict[str, Any] = {"data": "balanced", "augment": False, "validate": False, "max_epochs": 2, "ranks": 2}
    options["checkpoint"] = {"every_n_epochs": 0.3}
    assert run(tmp_path / "reference", **options) == 0, log(tmp_path / "reference")
    first, second = windows_of_epochs(tmp_path / "reference", 2)
    assert_balanced(first)
    assert_balanced(second)
    assert sorted(first) != sorted(second)
    killed = tmp_path / "killed"
    for kill_after_batch in (3, 4, 2, None):
        ckpt_path = last_good_checkpoint(killed / "checkpoints")
        resume = {"ckpt_path": str(ckpt_path), "seed": 50} if ckpt_path else {}
        status = run(killed, kill_after_batch=kill_after_batch, **resume, **options)
        assert status == (0 if kill_after_batch is None else -9), log(killed)
    for rank in range(2):
        assert_same(result(killed, rank), result(tmp_path / "reference", rank))
