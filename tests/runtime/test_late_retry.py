"""A bad step that the host hears of one step late ends as one that it hears of at once.

On a GPU with a fused optimizer the host does not wait for a step's verdict. Here the CPU is made to be as late.
"""

from typing import Any

import pytest
import torch

from lightning_stability import NaNEarlyStop, PrecisionFallback
from lightning_stability.runtime import watch
from tests import runs
from tests.recovery import poison

RESULTS = ("weights", "optimizers", "metrics", "rates", "step", "random", "precision")


def fused(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


def fit(pl: Any, kinds: dict[int, str], stops: list[Any], **options: Any) -> dict[str, Any]:
    module = poison.make_module(pl, kinds, fused, by_hand=False)
    options = {"plugins": runs.fp16(pl, init_scale=256.0), **options}
    return poison.fit(pl, module, [PrecisionFallback(), *stops], **options)


def both(monkeypatch: pytest.MonkeyPatch, pl: Any, kinds: dict[int, str], patience: int | None, **options: Any) -> Any:
    results = []
    for lag in (0, 1):
        monkeypatch.setattr(watch, "read_lag", lambda trainer, retries, lag=lag: lag)
        stops = [] if patience is None else [NaNEarlyStop(patience=patience)]
        results.append(fit(pl, kinds, stops, **options))
    return [{name: result[name] for name in RESULTS} for result in results], results


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("batch", [0, 2, 4, 5], ids=["first", "inside", "last but one", "last of the epoch"])
def test_an_overflow_is_trained_again_and_the_held_step_after_it(
    monkeypatch: pytest.MonkeyPatch, one: Any, batch: int, accumulate: int
) -> None:
    (now, late), results = both(monkeypatch, one, {batch: "large_input"}, None, accumulate_grad_batches=accumulate)
    assert results[1]["trainer"].precision_plugin.precision == "32-true"
    assert poison.differences(late, now) == []


@pytest.mark.parametrize("kind", ["nan_input", "inf_loss", "nan_gradient", "fp16_overflow"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_try_in_vain_leaves_the_held_step_trained(
    monkeypatch: pytest.MonkeyPatch, one: Any, kind: str, accumulate: int
) -> None:
    (now, late), results = both(monkeypatch, one, {2: kind}, 2, accumulate_grad_batches=accumulate)
    assert results[1]["trainer"].precision_plugin.precision == "16-mixed"
    assert poison.differences(late, now) == []


def test_several_bad_steps_in_a_row(monkeypatch: pytest.MonkeyPatch, one: Any) -> None:
    kinds = {2: "nan_input", 3: "inf_loss", 4: "large_input", 7: "nan_input"}
    (now, late), _ = both(monkeypatch, one, kinds, 2)
    assert poison.differences(late, now) == []


def test_a_stop_holds_what_came_after_the_bad_step(monkeypatch: pytest.MonkeyPatch, one: Any) -> None:
    _, (now, late) = both(monkeypatch, one, {2: "nan_input"}, 0)
    assert poison.differences(late["weights"], now["weights"]) == []
    assert late["trainer"].global_step <= now["trainer"].global_step + 1


def test_the_schedule_is_that_of_the_step_when_it_is_trained_again(monkeypatch: pytest.MonkeyPatch, one: Any) -> None:
    """The learning rate has moved on by then: it is set back for the two steps, and forth again."""
    (now, late), _ = both(monkeypatch, one, {1: "large_input"}, None)
    assert poison.differences(late["optimizers"], now["optimizers"]) == []
    assert poison.differences(late["rates"], now["rates"]) == []
