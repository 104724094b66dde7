"""fp16 that overflows in validation before it ever did in training."""

import math
from typing import Any

import pytest
import torch
import torchmetrics

from lightning_stability import NaNEarlyStop, PrecisionFallback
from tests import runs

LARGE = 1e6


def make(pl: Any, raises: bool = False, **overrides: Any) -> Any:
    """Validation batches whose second holds values that fp16 cannot hold."""

    def validation_step(self: Any, batch: Any, batch_idx: int) -> Any:
        output = self.net(batch[0] * (LARGE if batch_idx == 1 else 1.0)).pow(2).mean()
        if raises and not torch.isfinite(output):
            raise ValueError("Input contains NaN")
        self.metric.update(output.float())
        self.log("val_loss", output.float())
        return output

    module = runs.make_module(pl, validation_step=overrides.pop("validation_step", validation_step), **overrides)
    module.metric = torchmetrics.MeanMetric(nan_strategy=math.nan)
    return module


def fit(pl: Any, module: Any, callbacks: list[Any], **options: Any) -> Any:
    options = {"plugins": runs.fp16(pl), "max_epochs": 2, **options}
    trainer = runs.trainer(pl, callbacks=callbacks, **options)
    trainer.fit(module, runs.data(), runs.data())
    return trainer


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("sanity", [0, 2])
def test_the_batch_is_validated_in_fp32_and_the_run_continues(pl: Any, raises: bool, sanity: int) -> None:
    module = make(pl, raises)
    with pytest.warns(UserWarning, match="16-mixed cannot continue .*in validation"):
        trainer = fit(pl, module, [PrecisionFallback(), NaNEarlyStop()], num_sanity_val_steps=sanity)
    assert trainer.precision_plugin.precision == "32-true"
    assert trainer.global_step == 8
    assert torch.isfinite(trainer.callback_metrics["val_loss"])
    assert torch.isfinite(module.metric.compute())
    assert module.metric.update_count == sanity + 8, "no batch counts twice"


def test_what_is_not_finite_in_fp32_either_leaves_the_precision(pl: Any) -> None:
    def validation_step(self: Any, batch: Any, batch_idx: int) -> Any:
        self.log("val_loss", torch.tensor(float("nan")))
        return torch.tensor(float("nan"))

    trainer = fit(pl, make(pl, validation_step=validation_step), [PrecisionFallback()])
    assert trainer.precision_plugin.precision == "16-mixed"
    assert "validation_step" not in vars(trainer.strategy)


def test_16_true_validates_the_batch_as_it_was_before_the_cast(one: Any) -> None:
    def validation_step(self: Any, batch: Any, batch_idx: int) -> Any:
        output = self.net(batch[0]).float().pow(2).mean()
        self.log("val_loss", output)
        return output

    def data(scale: float) -> Any:
        x = torch.randn(8, 6) * scale
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=2)

    module = make(one, validation_step=validation_step, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=1e-3))
    trainer = runs.trainer(one, callbacks=[PrecisionFallback()], precision="16-true", num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="in validation"):
        trainer.fit(module, data(1.0), data(1e6))
    assert torch.isfinite(trainer.callback_metrics["val_loss"])
    assert next(module.parameters()).dtype == torch.float32
