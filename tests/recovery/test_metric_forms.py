"""Metrics of other forms are given back as the usual ones are, and nobody fails for one that was left out."""

import math
from typing import Any

import pytest
import torch
import torchmetrics
from torch import nn

from lightning_stability import NaNEarlyStop
from tests import runs

pl = runs.load_namespace("pytorch_lightning")
BAD = 3


def train(callbacks: Any = (), optimizer: Any = None, prepare: Any = None, epochs: int = 1, **methods: Any) -> Any:
    module = runs.make_module(pl, optimizer=optimizer, **methods)
    if prepare is not None:
        prepare(module)
    data = runs.data(16)
    data.dataset.tensors[0][2 * BAD] = torch.nan
    trainer = runs.trainer(pl, callbacks=[*callbacks, NaNEarlyStop()], max_epochs=epochs)
    trainer.fit(module, data)
    return module, trainer


def mean() -> Any:
    return torchmetrics.MeanMetric(nan_strategy=math.nan)


@pytest.mark.parametrize(
    ("make", "metrics"),
    [
        (lambda: {"a": mean(), "b": None}, lambda kept: [kept["a"]]),
        (lambda: [[mean()], (mean(),)], lambda kept: [kept[0][0], kept[1][0]]),
        (lambda: {"c": torchmetrics.MetricCollection({"d": mean()})}, lambda kept: [kept["c"]["d"]]),
        (lambda: [nn.ModuleList([mean()])], lambda kept: [kept[0][0]]),
    ],
)
def test_a_metric_in_a_plain_container_is_restored(make: Any, metrics: Any) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = self.net(batch[0]).pow(2).mean()
        for metric in metrics(self.kept):
            metric.update(loss.detach())
        return loss

    module, _ = train(prepare=lambda module: setattr(module, "kept", make()), training_step=training_step)
    for metric in metrics(module.kept):
        assert bool(metric.compute().isfinite())
        assert float(metric.weight) == 7


def test_what_is_logged_as_a_bad_batch_begins_is_restored_if_it_is_not_finite() -> None:
    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("mean", batch[0].mean(), on_step=False, on_epoch=True)
        self.log("batch", float(batch_idx), on_step=False, on_epoch=True, reduce_fx="sum")
        if batch_idx == BAD:
            self.log("rare", batch[0].mean(), on_step=False, on_epoch=True)

    _, trainer = train(on_train_batch_start=on_train_batch_start)
    metrics = trainer.callback_metrics
    assert bool(metrics["mean"].isfinite())
    assert float(metrics["batch"]) == sum(range(8))
    assert "rare" not in metrics


def logs_rarely(self: Any, batch: Any, batch_idx: int) -> Any:
    loss = self.net(batch[0]).pow(2).mean()
    if batch_idx == BAD:
        self.log("rare", loss, on_step=True, on_epoch=True)
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max")
    return loss


@pytest.mark.parametrize("key", ["rare", "rare_epoch", "largest"])
def test_early_stopping_passes_over_an_epoch_without_its_metric(key: str) -> None:
    early = pl.callbacks.EarlyStopping(key)
    _, trainer = train([early], epochs=2, training_step=logs_rarely)
    assert trainer.current_epoch == 2
    assert key not in trainer.callback_metrics
    assert early.strict


@pytest.mark.parametrize("key", ["rare", "largest"])
def test_a_plateau_schedule_passes_over_an_epoch_without_its_metric(key: str) -> None:
    def optimizer(module: Any) -> Any:
        adamw = torch.optim.AdamW(module.parameters())
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(adamw)
        return {"optimizer": adamw, "lr_scheduler": {"scheduler": schedule, "monitor": key}}

    _, trainer = train(optimizer=optimizer, epochs=2, training_step=logs_rarely)
    assert trainer.current_epoch == 2
    assert all(config.strict for config in trainer.lr_scheduler_configs)


def test_a_metric_that_nobody_logs_is_an_error_as_ever() -> None:
    with pytest.raises(RuntimeError, match="not available"):
        train([pl.callbacks.EarlyStopping("no such key")], training_step=logs_rarely)
