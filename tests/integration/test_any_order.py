"""The callbacks in any order, given to the Trainer or brought by the environment: it is the same run."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_stability import FractionalCheckpoint, GradNormMonitor, NaNEarlyStop, PrecisionFallback
from tests import runs
from tests.recovery import poison

pl = runs.load_namespace("pytorch_lightning")
NAMES = ("NaNEarlyStop", "PrecisionFallback", "GradNormMonitor", "FractionalCheckpoint")
OPTIONS = {"NaNEarlyStop": {"patience": 1}, "FractionalCheckpoint": {"every_n_epochs": 0.5, "save_top_k": -1}}
CLASSES = {c.__name__: c for c in (FractionalCheckpoint, GradNormMonitor, NaNEarlyStop, PrecisionFallback)}
NOT_OF_THE_RUN = ("time", "seconds", "path")


def in_words(name: str) -> str:
    """A callback, as the environment variable names it."""
    return f"{name}({', '.join(f'{option}={value}' for option, value in OPTIONS.get(name, {}).items())})"


def fit(folder: Path, given: tuple[str, ...], brought: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Twelve steps: an artefact that fp16 cannot hold, one that nothing can, and a bad gradient after the change."""
    monkeypatch.setenv("LIGHTNING_STABILITY_CALLBACKS", ", ".join(map(in_words, brought)) or "none")
    kinds = {1: "nan_input", 3: "large_input", 5: "nan_gradient", 8: "inf_loss"}
    module = poison.make_module(pl, kinds, lambda p: torch.optim.AdamW(p, lr=1e-2), by_hand=False)
    logger = runs.memory_logger(pl)
    type(logger).log_dir = property(lambda self: str(folder))
    result = poison.fit(
        pl,
        module,
        [CLASSES[name](**OPTIONS.get(name, {})) for name in given],
        plugins=runs.fp16(pl, init_scale=256.0),
        logger=logger,
        default_root_dir=folder,
        enable_checkpointing=True,
        gradient_clip_val=1.0,
    )
    assert result["trainer"].precision == "32-true"
    events = [{k: v for k, v in event.items() if k not in NOT_OF_THE_RUN} for event in runs.incidents(folder)]
    # (with none given, Lightning adds a ModelCheckpoint of its own)
    saved = {path.name: torch.load(path, weights_only=True) for path in sorted(folder.rglob("epoch=00*.ckpt"))}
    return {
        **result,
        "events": sorted(str(sorted(event.items())) for event in events),
        "rows": sorted(f"{step} {sorted(row.items())}" for step, row in logger.rows),
        "saved": {
            name: [checkpoint[key] for key in ("state_dict", "optimizer_states", "lr_schedulers")]
            + [checkpoint["callbacks"].get(callback) for callback in NAMES[:3]]
            for name, checkpoint in saved.items()
        },
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as monkeypatch:
        result = fit(tmp_path_factory.mktemp("reference"), NAMES, (), monkeypatch)
    kinds = [event.split("('event', '")[1].split("'")[0] for event in result["events"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "precision_kept": 1,
        "precision_changed": 1,
        "update_skipped": 3,
        "checkpoint_saved": 4,
    }
    assert len(result["saved"]) == 4
    assert any("precision_bits" in row for row in result["rows"])
    assert poison.nonfinite(result["weights"]) == []
    return result


ORDERS = list(itertools.permutations(NAMES))
# how many of an order are given to the Trainer; the environment brings the others
CASES = [(order, given) for given in (4, 2, 0) for order in ORDERS]
FAST = {CASES[i] for i in (1, 6, 9, 16, 23, 27, 34, 39, 46, 51, 60, 70)}


@pytest.mark.parametrize(
    ("order", "given"),
    [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(name[0] for name in value),
)
def test_the_order_changes_no_result(
    order: tuple[str, ...], given: int, reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = fit(tmp_path, order[:given], order[given:], monkeypatch)
    assert poison.differences(result, reference) == []
