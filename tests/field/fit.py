"""A short training of somebody else's project: `python -m tests.field.fit PROJECT FORM FOLDER [bad]`.

FORM is `none` (as if this package were not installed), `installed` (the automatic callbacks) or `code` (all callbacks
in `Trainer(callbacks=[...])`). With `bad`, one value of one training batch is NaN. Prints what came of it.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from tests.plugin.fuzz import digest

BAD_BATCH = 2
"""Which batch of the first epoch is spoiled."""


class Spoiled:
    """Collates, and spoils one batch."""

    def __init__(self, collate: Callable[[Any], Any], spoil: Callable[[Any], None]) -> None:
        self._collate, self._spoil, self._calls = collate, spoil, 0

    def __call__(self, samples: Any) -> Any:
        batch = self._collate(samples)
        if self._calls == BAD_BATCH:
            self._spoil(batch)
        self._calls += 1
        return batch


def spoiled(loader: DataLoader[Any], spoil: Callable[[Any], None] | None) -> DataLoader[Any]:
    """The loader, of which one batch is spoiled."""
    if spoil is not None:
        loader.collate_fn = Spoiled(loader.collate_fn, spoil)
    return loader


def trainer_options(folder: str, callbacks: list[Any]) -> dict[str, Any]:
    """For a quiet Trainer that writes only there."""
    return {
        "accelerator": "cpu",
        "callbacks": callbacks,
        "default_root_dir": folder,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "log_every_n_steps": 1,
        "max_epochs": 2,
    }


def main(project: str, form: str, folder: str, *bad: str) -> None:
    """Train, and print the outcome as JSON."""
    os.environ["LIGHTNING_STABILITY_CALLBACKS"] = "none" if form != "installed" else ""
    warnings.simplefilter("always")
    callbacks: list[Any] = []
    if form == "code":
        from lightning_stability.plugin import CALLBACKS

        callbacks = [cls() for cls in CALLBACKS]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    trainer, module = importlib.import_module(f"tests.field.{project}").fit(folder, callbacks, bool(bad))
    ours = ("grad_norm", "weight_norm", "update_ratio", "loss_scale", "skipped", "input")
    metrics = {name: v for name, v in trainer.callback_metrics.items() if not name.startswith(ours)}
    outcome = {
        "weights": digest(module.state_dict()),
        "optimizers": digest([optimizer.state_dict()["state"] for optimizer in trainer.strategy._optimizers]),
        "random": digest([torch.get_rng_state(), str(random.getstate()), int(np.random.get_state()[1].sum())]),
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "metrics": digest(metrics),
        "active": [type(c).__name__ for c in callbacks] or form,
        "left": [type(c).__module__ for c in trainer.callbacks if "stability" in type(c).__module__],
        "finite": all(bool(t.isfinite().all()) for t in module.state_dict().values() if t.is_floating_point()),
        "finite_state": all(
            bool(torch.as_tensor(value).isfinite().all())
            for optimizer in trainer.strategy._optimizers
            for state in optimizer.state_dict()["state"].values()
            for value in state.values()
        ),
        "nonfinite_metrics": sorted(name for name, value in metrics.items() if not torch.as_tensor(value).isfinite()),
    }
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(*sys.argv[1:])
