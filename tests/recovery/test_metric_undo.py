"""What a bad batch gave to metrics is taken back; the device's way and the host's way agree."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics import CatMetric, MaxMetric, MeanMetric, MetricCollection
from torchmetrics.classification import BinaryAUROC, BinaryPrecision, BinaryRecall

from lightning_stability import NaNEarlyStop
from lightning_stability.recovery import MetricUndo
from tests import runs


class Metered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric(nan_strategy=math.nan)
        self.several = MetricCollection([BinaryPrecision(), BinaryRecall(), BinaryAUROC()])


@pytest.mark.usefixtures("way")
@given(bad=st.lists(st.booleans(), min_size=1, max_size=8), settle_twice=st.booleans())
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_metrics_are_those_of_the_good_batches(bad: list[bool], settle_twice: bool) -> None:
    torch.manual_seed(0)
    ours, reference = Metered(), Metered()
    undo = MetricUndo(ours, lambda: None)
    for is_bad in bad:
        scores, target = torch.rand(4), torch.randint(0, 2, (4,))
        undo.remember()
        for module in (ours, reference):
            if module is reference and is_bad:
                continue
            module.mean.update(torch.tensor(torch.nan if is_bad else 1.5))
            module.several.update(scores, target)
        verdict = torch.tensor(is_bad)
        undo.restore(verdict)
        if settle_twice:
            ours.mean.update(7.0)
            if not is_bad:
                reference.mean.update(7.0)
            undo.restore(verdict)
    undo.trim()
    if all(bad):
        assert float(ours.mean.mean_value) == 0.0
        assert not ours.several["BinaryAUROC"].preds
        return
    assert torch.equal(ours.mean.compute(), reference.mean.compute())
    for name, value in reference.several.compute().items():
        assert torch.equal(ours.several.compute()[name], value), name


def fit_logging(log: Callable[[Any, Tensor, int], None], bad: set[int], **options: Any) -> tuple[Any, Any]:
    """Train for batches of 4 samples, those of `bad` with a NaN; the module logs as it is told."""
    pl = runs.load_namespace("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 1)
            self.mean, self.largest = MeanMetric(nan_strategy=math.nan), MaxMetric(nan_strategy=math.nan)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.net(batch[0] * (torch.nan if batch_idx in bad else 1.0)).pow(2).mean()
            log(self, loss.detach(), batch_idx)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01, fused=True)

    module = Module()
    trainer = runs.trainer(pl, callbacks=[NaNEarlyStop(patience=9)], **{"max_epochs": 1, **options})
    data = torch.utils.data.TensorDataset(torch.randn(32, 8))
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    return trainer, module


WAYS_TO_LOG: dict[str, Callable[[Any, Tensor], None]] = {
    "mean": lambda m, v: m.log("key", v, on_step=False, on_epoch=True),
    "max": lambda m, v: m.log("key", v, on_step=False, on_epoch=True, reduce_fx="max"),
    "sum": lambda m, v: m.log("key", v * 0, on_step=False, on_epoch=True, reduce_fx="sum"),
    "metric": lambda m, v: (m.mean.update(v), m.log("key", m.mean, on_step=False, on_epoch=True)),
    "largest": lambda m, v: (m.largest.update(v), m.log("key", m.largest, on_step=False, on_epoch=True)),
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("how", WAYS_TO_LOG)
@pytest.mark.parametrize(("logged", "is_there"), [({5}, False), ({1, 5}, False), ({5, 6}, True), ({0, 1}, True)])
def test_a_key_that_only_bad_batches_logged_is_absent(how: str, logged: set[int], is_there: bool) -> None:
    def log(module: Any, value: Tensor, batch_idx: int) -> None:
        if batch_idx in logged:
            WAYS_TO_LOG[how](module, value)

    trainer, _ = fit_logging(log, {1, 5})
    assert {k: float(v) for k, v in trainer.callback_metrics.items() if v != v} == {}
    assert ("key" in trainer.callback_metrics) == is_there


def test_each_epoch_is_looked_at_by_itself() -> None:
    def log(module: Any, value: Tensor, batch_idx: int) -> None:
        if module.trainer.current_epoch == 0 or batch_idx == 5:
            module.log("key", value, on_step=False, on_epoch=True)

    assert "key" in fit_logging(log, {5})[0].callback_metrics
    trainer, _ = fit_logging(log, {5}, max_epochs=2)
    assert "key" not in trainer.fit_loop.epoch_loop._results.metrics(on_step=False)["callback"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1.0])
@pytest.mark.parametrize("how", ["mean", "max", "metric", "largest", "step", "list"])
def test_what_a_batch_logged_tells_whether_it_was_bad(how: str, value: float) -> None:
    ways = {
        **WAYS_TO_LOG,
        "step": lambda m, v: m.log("key", v, on_step=True, on_epoch=False),
        "list": lambda m, v: m.scores.update(v),
    }
    flags: list[bool] = []

    def log(module: Any, loss: Tensor, batch_idx: int) -> None:
        if batch_idx == 0:
            module.scores = CatMetric(nan_strategy=math.nan)
            module.undo = MetricUndo(module, lambda: module.trainer.fit_loop.epoch_loop._results)
        module.undo.remember()
        assert module.undo.nonfinite() is None
        ways[how](module, torch.tensor(value if batch_idx == 3 else 1.0))
        flags.append(bool(module.undo.nonfinite()))
        module.undo.restore(torch.tensor(flags[-1]))

    fit_logging(log, set())
    assert flags == [batch == 3 and value != 1.0 for batch in range(8)]
