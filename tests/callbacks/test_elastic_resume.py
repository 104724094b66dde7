"""An epoch that one number of processes, or one batch size, began and another one ends: each sample counts once."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_stability.checkpointing import last_good_checkpoint
from tests import checkpoint_fit as fits
from tests.callbacks.test_fractional_checkpoint import log, ranked, result

OPTIONS: dict[str, Any] = {"validate": False, "augment": False, "max_epochs": 1, "module": {"counts": True}}
SAMPLES = 71


def seen(folder: Path, ranks: int) -> list[int]:
    return [index for rank in range(ranks) for batch in result(folder, rank)["seen"] for index in batch]


def run(processes: fits.Fits, folder: Path, ranks: int, **options: Any) -> None:
    start = ranked(processes) if ranks > 1 else processes.run
    assert start(folder, **OPTIONS, **options, **({"ranks": ranks} if ranks > 1 else {})) == 0, log(folder)


def checkpoint(folder: Path) -> str:
    path = last_good_checkpoint(folder / "checkpoints")
    assert path is not None
    return str(path)


@pytest.mark.parametrize(
    ("data", "ranks"),
    [
        ("plain uneven", (2, 1)),
        ("plain uneven", (1, 2)),
        pytest.param("plain uneven", (2, 3, 1, 2), marks=pytest.mark.slow),
        ("uneven", (1, 2)),
        pytest.param("uneven", (2, 1, 3), marks=pytest.mark.slow),
    ],
)
def test_with_another_number_of_processes_every_sample_is_trained_and_counted_once(
    tmp_path: Path, processes: fits.Fits, data: str, ranks: tuple[int, ...]
) -> None:
    trained: list[int] = []
    for number, count in enumerate(ranks):
        folder = tmp_path / str(number)
        resume = {"ckpt_path": checkpoint(tmp_path / str(number - 1)), "seed": 9} if number else {}
        stop = {} if number == len(ranks) - 1 else {"max_steps": 2 * number + 2}
        run(processes, folder, count, data=data, workers=2 if number == 1 else 0, **resume, **stop)
        trained += seen(folder, count)
    assert sorted(trained) == list(range(SAMPLES))
    metrics = result(folder)["metrics"]
    assert metrics["samples"] == SAMPLES
    assert metrics["index"] == pytest.approx((SAMPLES - 1) / 2)


@pytest.mark.parametrize("data", ["plain uneven", "uneven", "plain weighted"])
def test_with_another_batch_size_the_rest_of_the_epoch_is_trained_once(tmp_path: Path, data: str) -> None:
    def fit(folder: str, **options: Any) -> list[int]:
        (tmp_path / folder).mkdir()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fits.fit(tmp_path / folder, data=data, **OPTIONS, **options)
        said.extend(str(warning.message) for warning in caught)
        return seen(tmp_path / folder, 1)

    said: list[str] = []
    whole = fit("whole")
    trained = fit("first", max_steps=3)
    trained += fit("second", max_steps=5, batch_size=7, ckpt_path=checkpoint(tmp_path / "first"), seed=9)
    said.clear()
    trained += fit("third", batch_size=7, ckpt_path=checkpoint(tmp_path / "second"), seed=99)
    assert trained == whole
    assert not any("dealt out anew" in text for text in said), "it goes on with batches of the same size"
    metrics = result(tmp_path / "third")["metrics"]
    assert metrics["samples"] == len(whole)
    assert metrics["index"] == pytest.approx(sum(whole) / len(whole))


def test_data_that_cannot_be_dealt_out_anew_begins_again_with_the_reason(tmp_path: Path) -> None:
    fits.fit(tmp_path, data="plain uneven", max_steps=3, **OPTIONS)
    path = checkpoint(tmp_path)
    with pytest.warns(UserWarning, match="the data had 71 samples and has 28"):
        fits.fit(tmp_path, data="plain", batch_size=7, ckpt_path=path, **OPTIONS)
    assert sorted(seen(tmp_path, 1)) == list(range(28))


@pytest.mark.parametrize("place", [3, 7])
def test_steps_after_a_change_of_batch_size_are_not_called_other_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: int
) -> None:
    """Inside the epoch and at its end: the earlier run went on, and its batches were others."""
    two = {**OPTIONS, "max_epochs": 2}
    fits.fit(tmp_path, data="plain", checkpoint={"every_n_epochs": place / 7}, **two)
    path = min(
        (tmp_path / "checkpoints").glob("*.ckpt"), key=lambda file: torch.load(file, weights_only=False)["global_step"]
    )
    with warnings.catch_warnings(record=True) as caught, caplog.at_level("INFO"):
        warnings.simplefilter("always")
        fits.fit(tmp_path, data="plain", batch_size=7, ckpt_path=str(path), **two)
    assert "which took other batches: the batch size was 4 and is 7" in caplog.text
    assert not any("the resume is not exact" in str(warning.message) for warning in caught)


def test_a_change_of_batch_size_hides_no_other_weights(tmp_path: Path) -> None:
    fits.fit(tmp_path, data="plain", checkpoint={"every_n_epochs": 3 / 7}, **OPTIONS)
    path = min((tmp_path / "checkpoints").glob("*.ckpt"))
    content = torch.load(path, weights_only=False)
    next(iter(content["state_dict"].values())).add_(1e-3)
    torch.save(content, path)
    with pytest.warns(UserWarning, match="the resume is not exact: other weights"):
        fits.fit(tmp_path, data="plain", batch_size=7, ckpt_path=str(path), **OPTIONS)
