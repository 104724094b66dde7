"""A run that has left 16-bit precision goes on from its checkpoints as if it had not been interrupted."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_stability import FractionalCheckpoint, GradNormMonitor, NaNEarlyStop, PrecisionFallback
from lightning_stability.checkpointing import last_good_checkpoint
from tests import checkpoint_fit as fits
from tests import runs
from tests.callbacks.test_fractional_checkpoint import assert_same, log, ranked, result

one = runs.load_namespace("pytorch_lightning")


# Killed processes

LARGE = 5
FROM_16_TRUE = {"precision": "16-true", "module": {"large": LARGE, "eps": 1e-3}}
KILLED: dict[str, dict[str, Any]] = {
    "16-mixed": {"fp16": True},
    "16-true": FROM_16_TRUE,
    "accumulation": {"fp16": True, "accumulate_grad_batches": 3},
    "to bf16-mixed": {"fp16": True, "fallback": "bf16-mixed"},
    "bf16-mixed that stays": {"precision": "bf16-mixed"},
    "16-true, accumulation, clipping": {
        **FROM_16_TRUE,
        "accumulate_grad_batches": 3,
        "gradient_clip_val": 0.1,
    },
    "two ranks": {"fp16": True, "ranks": 2, "data": "ranks", "augment": False, "validate": False},
    "manual optimization": {"fp16": True, "module": {"large": LARGE, "manual": True}},
    "manual optimization, 16-true": {"precision": "16-true", "module": {"large": LARGE, "manual": True, "eps": 1e-3}},
}
FAST = ("16-mixed", "16-true")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in KILLED])
def test_killed_before_and_after_the_change_and_resumed_it_ends_as_the_run_that_was_not_killed(
    tmp_path: Path, processes: fits.Fits, name: str
) -> None:
    """The Trainer's flag says 16 bits each time; before the change GradScaler goes on where it was."""
    options = {"max_epochs": 2, "fallback": "32-true", "module": {"large": LARGE}, **KILLED[name]}
    options["checkpoint"] = {"every_n_epochs": 0.3, "save_top_k": 1}
    run = ranked(processes) if "ranks" in options else processes.run
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    assert run(reference, **options) == 0, log(reference)
    # after batch 4, before the large one; then after it, in the same epoch and in the next
    for kill_after_batch in (4, 3, 5, None):
        path = last_good_checkpoint(killed / "checkpoints")
        resume = {"ckpt_path": str(path), "seed": 50} if path else {}
        status = run(killed, kill_after_batch=kill_after_batch, **resume, **options)
        assert status == (0 if kill_after_batch is None else -9), log(killed)
    ours, theirs = result(killed), result(reference)
    assert_same(ours, theirs)
    assert ours["precision"] == theirs["precision"]
    assert theirs["precision"][0] == ("bf16-mixed" if "stays" in name else options["fallback"])
    assert fits.read_rows(killed) == fits.read_rows(reference)


def test_a_run_that_did_not_fall_back_gives_grad_scaler_its_state_back(tmp_path: Path, processes: fits.Fits) -> None:
    options = {"max_epochs": 1, "fallback": "32-true", "fp16": True, "checkpoint": {"every_n_epochs": 0.3}}
    assert processes.run(tmp_path / "reference", **options) == 0
    assert processes.run(tmp_path / "killed", kill_after_batch=5, **options) == -9
    [*_, path] = sorted((tmp_path / "killed" / "checkpoints").glob("epoch=*.ckpt"))
    scaler = torch.load(path, weights_only=True)["MixedPrecision"]
    assert scaler["scale"] == 256.0
    assert scaler["_growth_tracker"] > 0
    assert processes.run(tmp_path / "killed", ckpt_path=str(path), **options) == 0, log(tmp_path / "killed")
    ours, theirs = result(tmp_path / "killed"), result(tmp_path / "reference")
    assert_same(ours, theirs)
    assert ours["precision"] == theirs["precision"]
    assert ours["precision"][0] == "16-mixed"
    assert ours["precision"][1]["_growth_tracker"] == 7


# In this process


def fit(
    folder: Path,
    callbacks: list[Any],
    large: int | None = 2,
    net: Any = None,
    ckpt_path: Any = None,
    pl: Any = one,
    **options: Any,
) -> tuple[Any, Any]:
    """Ten steps; a checkpoint after each."""

    def training_step(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        number = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1
        return self.net(batch[0] * (1e6 if number == large else 1.0)).float().pow(2).mean()

    module = runs.make_module(
        pl,
        net() if net else runs.Net(),
        optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, eps=1e-3),
        training_step=training_step,
        on_before_optimizer_step=lambda self, optimizer: None,
    )
    if "precision" not in options:
        options["plugins"] = runs.fp16(pl, init_scale=256.0)
    saver = pl.callbacks.ModelCheckpoint(
        folder, filename="{step}", save_top_k=-1, every_n_train_steps=1, enable_version_counter=False
    )
    trainer = runs.trainer(pl, callbacks=[*callbacks, saver], enable_checkpointing=True, max_epochs=2, **options)
    trainer.fit(module, runs.data(10), ckpt_path=ckpt_path)
    return trainer, module


def weights(module: Any) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in module.state_dict().values()])


@pytest.mark.parametrize("flag", ["16-true", "bf16-mixed", "bf16-true", "32-true"])
def test_whatever_the_flag_says_it_goes_on_in_the_precision_it_had_fallen_back_to(
    pl: Any, tmp_path: Path, flag: str
) -> None:
    whole, trained = fit(tmp_path, [PrecisionFallback()], pl=pl)
    assert whole.precision == "32-true"
    # epochs' borders resume exactly without more ado
    options = {"ckpt_path": tmp_path / "step=5.ckpt", "precision": flag, "pl": pl}
    resumed, again = fit(tmp_path, [PrecisionFallback()], None, **options)
    assert resumed.precision == "32-true"
    assert torch.equal(weights(again), weights(trained))


def test_an_evaluation_of_its_checkpoint_is_in_that_precision_too(tmp_path: Path) -> None:
    fit(tmp_path, [PrecisionFallback()], precision="16-true")
    seen: list[torch.dtype] = []

    def test_step(self: Any, batch: Any, batch_idx: int) -> None:
        seen.append(self.net(batch[0]).dtype)

    module = runs.make_module(one, test_step=test_step)
    trainer = runs.trainer(one, callbacks=[PrecisionFallback(), NaNEarlyStop(patience=0)], precision="16-true")
    trainer.test(module, runs.data(), ckpt_path=tmp_path / "step=5.ckpt", verbose=False)
    assert set(seen) == {torch.float32}


def test_what_it_had_fallen_back_to_is_the_checkpoints_and_not_the_callbacks(tmp_path: Path) -> None:
    fit(tmp_path, [PrecisionFallback("bf16-mixed")])
    callback = PrecisionFallback("32-true")
    resumed, _ = fit(tmp_path, [callback], None, ckpt_path=tmp_path / "step=5.ckpt")
    assert resumed.precision == "bf16-mixed"
    assert callback.state_dict()["to"] == "bf16-mixed"
    further, _ = fit(tmp_path, [callback], 7, ckpt_path=tmp_path / "step=5.ckpt")
    assert further.precision == "bf16-mixed", "which holds such values"


def test_a_run_may_fall_back_once_more_from_bf16(tmp_path: Path) -> None:
    fit(tmp_path, [PrecisionFallback("bf16-mixed")])

    class Beyond(runs.Net):
        """Not finite in bf16 after a while."""

        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            out = super().forward(x)
            return out * torch.inf if self.calls > 2 and out.dtype == torch.bfloat16 else out

    callback = PrecisionFallback()
    resumed, module = fit(tmp_path, [callback], None, net=Beyond, ckpt_path=tmp_path / "step=5.ckpt")
    assert resumed.precision == "32-true"
    assert callback.state_dict()["fallen_from"] == "bf16-mixed"
    assert torch.isfinite(weights(module)).all()


class Late(nn.Module):
    """What a checkpoint does not hold: a table of fp32 values, which 16-true rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 1)
        self.register_buffer("table", torch.linspace(0.0, 1.0, 8), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)) + self.table)


@pytest.mark.parametrize("made_in", ["__init__", "init_module"])
def test_from_16_true_also_what_no_checkpoint_holds_is_as_it_was(tmp_path: Path, made_in: str) -> None:
    """A Trainer whose flag still says 16-true may have made the weights in fp16 before it loads them."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        if made_in == "__init__":
            return Late()
        with runs.trainer(one, precision="16-true").init_module():
            return Late()

    _, trained = fit(tmp_path, [PrecisionFallback()], net=net, precision="16-true")
    resumed, again = fit(
        tmp_path, [PrecisionFallback()], None, net=net, precision="16-true", ckpt_path=tmp_path / "step=5.ckpt"
    )
    assert resumed.precision == "32-true"
    assert torch.equal(again.net.table, trained.net.table)
    assert torch.equal(weights(again), weights(trained))
    assert again.dtype == trained.dtype == torch.float32


@pytest.mark.parametrize("first", [True, False])
def test_with_averaged_weights_from_16_true(tmp_path: Path, first: bool) -> None:
    """Lightning keeps the averages where the weights are otherwise."""

    def callbacks() -> list[Any]:
        made = [PrecisionFallback(), one.callbacks.EMAWeightAveraging(decay=0.5)]
        return made if first else made[::-1]

    _, trained = fit(tmp_path, callbacks(), precision="16-true")
    _, again = fit(tmp_path, callbacks(), None, precision="16-true", ckpt_path=tmp_path / "step=5.ckpt")
    assert torch.equal(weights(again), weights(trained))


def test_a_callback_used_again_in_another_trainer_has_fallen_back_from_nothing(tmp_path: Path) -> None:
    callback = PrecisionFallback()
    first, _ = fit(tmp_path, [callback])
    assert callback.state_dict()["fallen_from"] == "16-mixed"
    first.fit_loop.max_epochs = 3
    first.fit(first.lightning_module, runs.data(10))
    assert callback.state_dict()["fallen_from"] == "16-mixed", "it is the same run"
    second, _ = fit(tmp_path, [callback], None)
    assert second.precision == "16-mixed"
    assert callback.state_dict() == {}


# Without the callback


def resumed_warnings(folder: Path, callbacks: list[Any], **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(folder, callbacks, None, ckpt_path=folder / "step=5.ckpt", **options)
    return [str(w.message) for w in caught]


def test_a_run_that_resumes_without_the_callback_is_warned_once(tmp_path: Path) -> None:
    fit(tmp_path, [PrecisionFallback()])
    saver = FractionalCheckpoint(dirpath=tmp_path / "ours")
    for ours in ([NaNEarlyStop(patience=0)], [saver], [GradNormMonitor(), saver, NaNEarlyStop(patience=0)]):
        said = [text for text in resumed_warnings(tmp_path, ours) if "fallen back" in text]
        assert len(said) == 1
        assert said[0].startswith(
            "This run had fallen back from 16-mixed to 32-true at global step 2 (the loss was nan; the input of"
        )
        assert said[0].endswith("it continues in 16-mixed: add the callback, or give precision='32-true'.")
    said = resumed_warnings(tmp_path, [])
    assert any("Please add the following callbacks: ['PrecisionFallback']" in text for text in said), "Lightning does"
    for quiet in ({"precision": "32-true"}, {"precision": "16-mixed"}):
        ours = (
            [NaNEarlyStop(patience=0)]
            if quiet["precision"] == "32-true"
            else [NaNEarlyStop(patience=0), PrecisionFallback()]
        )
        assert not [text for text in resumed_warnings(tmp_path, ours, **quiet) if "had fallen back" in text]
