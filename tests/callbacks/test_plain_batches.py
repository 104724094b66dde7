"""Batches that no DataLoader makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.demos.boring_classes import BoringModel

from lightning_stability.plugin import CALLBACKS
from tests import runs


class Batches:
    """A list of batches; its iterator takes no weak reference."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([torch.randn(2, 32) for _ in range(4)])


@pytest.mark.parametrize("callback", CALLBACKS, ids=lambda kind: kind.__name__)
def test_batches_from_a_plain_list_train_with_each_callback(one: Any, tmp_path: Path, callback: type) -> None:
    options = {"steps_per_epoch": 4} if callback.__name__ == "FractionalCheckpoint" else {}
    trainer = runs.trainer(
        one, callbacks=[callback(**options)], max_epochs=2, enable_checkpointing=True, default_root_dir=tmp_path
    )
    trainer.fit(BoringModel(), Batches())
    assert trainer.global_step == 8
