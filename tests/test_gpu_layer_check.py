"""The layer scale check on a GPU: nothing changes, and the figures are read once."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lightning_stability import InputCheck
from lightning_stability.health.layer_scales import LayerScales
from tests import busy_module, runs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
pl = runs.load_namespace("pytorch_lightning")


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true"])
def test_a_run_with_the_check_is_bit_equal_to_one_without(
    precision: str, accumulate: int, caplog: pytest.LogCaptureFixture
) -> None:
    results = []
    for check in ([], [InputCheck()]):
        module = busy_module.make_module(pl)
        options = {"accelerator": "gpu", "precision": precision, "accumulate_grad_batches": accumulate}
        with caplog.at_level("INFO"):
            results.append(busy_module.fit(pl, module, check, **options))
        results[-1]["cuda random"] = torch.cuda.get_rng_state()
    assert busy_module.differences(*results) == []
    assert f"measured 6 layers in the first batch, in {precision}" in caplog.text


def test_the_crash_in_real_fp16(caplog: pytest.LogCaptureFixture) -> None:
    class Wrong(nn.Module):
        def forward(self, x: Any) -> Any:
            return x / 2.124e-05

    net = nn.Sequential(nn.LayerNorm(6), Wrong(), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    trainer = runs.trainer(pl, callbacks=[InputCheck()], accelerator="gpu", precision="16-mixed", max_steps=1)
    with pytest.warns(UserWarning, match=r"the input of `net\.2` has std .* so `net\.1` multiplies by 47,081"):
        trainer.fit(runs.make_module(pl, net), runs.data())


def test_nothing_waits_for_the_device_until_the_figures_are_read() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).cuda()
    x = torch.randn(16, 6, device="cuda")
    net(x)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with LayerScales(net) as scales:
                net(x)
            before = len([w for w in caught if "synchroniz" in str(w.message)])
            scales.read()
            after = len([w for w in caught if "synchroniz" in str(w.message)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (before, after) == (0, 1)
