"""The look at the first batch: it sees every layer, and a run with it is the run without it."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_stability.callbacks.layer_look import LayerLook
from tests import rehearsed_module, runs


@pytest.fixture(params=runs.NAMESPACES)
def pl(request: pytest.FixtureRequest) -> Any:
    return runs.load_namespace(request.param)


def look(pl: Any) -> Any:
    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 0 and batch_idx == 0:
                self.look = LayerLook(100.0)
                self.report = self.look.before_step(trainer, batch, batch_idx)
                self.before = self.report

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.report = self.look.after_step(trainer) or self.report

    return Look()


PRECISIONS: dict[str, Any] = {
    "32-true": lambda pl: {},
    "16-mixed": lambda pl: {"plugins": runs.fp16(pl)},
    "bf16-mixed": lambda pl: {"precision": "bf16-mixed"},
    "16-true": lambda pl: {"precision": "16-true"},
    "bf16-true": lambda pl: {"precision": "bf16-true"},
    "64-true": lambda pl: {"precision": "64-true"},
}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_with_the_look_is_bit_equal_to_one_without(pl: Any, precision: str, accumulate: int) -> None:
    options = {"accumulate_grad_batches": accumulate}
    callback = look(pl)
    module = rehearsed_module.make_module(pl)
    results = [
        rehearsed_module.fit(pl, module, callbacks, **options, **PRECISIONS[precision](pl))
        for module, callbacks in ((rehearsed_module.make_module(pl), []), (module, [callback]))
    ]
    assert rehearsed_module.differences(*results) == []
    assert callback.before is not None
    names = [row.layer.name for row in callback.report.rows]
    assert names == ["net.0", "net.1", "net.2", "net.3", "net.4", "head"]
    assert all(row.exact is not None and row.trained is not None for row in callback.report.rows)
    assert callback.report.warnings() == []
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())
