"""The guard on a GPU: the device decides, nothing waits for it, and a bad step leaves no trace."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_stability import FractionalCheckpoint, GradNormMonitor, NaNEarlyStop, PrecisionFallback
from lightning_stability.checkpointing import last_good_checkpoint, list_checkpoints
from tests import checkpoint_fit as fits
from tests import runs
from tests.callbacks.test_fractional_checkpoint import result, resume_from_all, saved
from tests.recovery import poison
from tests.test_gpu import CountSynchronisations

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products need
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
pl = runs.load_namespace("pytorch_lightning")

OPTIMIZERS = {
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
}
KINDS = ["nan_input", "inf_loss", "nan_loss", "nan_gradient", "overflow"]


def fit(module: Any, callbacks: list[Any], **options: Any) -> dict[str, Any]:
    torch.cuda.manual_seed(5)
    result = poison.fit(pl, module, callbacks, accelerator="gpu", **options)
    return {**result, "cuda random": torch.cuda.get_rng_state()}


def compare(kinds: dict[int, str], optimizer: str, **options: Any) -> None:
    results = []
    for by_hand in (False, True):
        module = poison.make_module(pl, kinds, OPTIMIZERS[optimizer], by_hand)
        callbacks = [] if by_hand else [NaNEarlyStop(patience=10**6)]
        results.append(fit(module, callbacks, **options))
    assert poison.differences(*results) == []
    assert poison.nonfinite(results[0]["weights"]) == []


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_bad_leaves_no_trace(optimizer: str, kind: str) -> None:
    compare({0: kind, 2: kind, 5: kind, 6: kind, 11: kind}, optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_poisoned_window_is_dropped_whole(optimizer: str) -> None:
    compare({1: "nan_input", 5: "inf_loss", 9: "nan_gradient"}, optimizer, accumulate_grad_batches=4)


@pytest.mark.parametrize("kind", ["nan_input", "inf_loss", "nan_gradient"])
def test_with_grad_scaler(kind: str) -> None:
    """The fused optimizer unscales by itself; the reference has it done beforehand."""
    results = []
    for by_hand in (False, True):
        module = poison.make_module(pl, {2: kind, 7: kind}, OPTIMIZERS["AdamW fused"], by_hand)
        if by_hand:
            configure = module.configure_optimizers

            def configured(configure: Any = configure) -> Any:
                made = configure()
                made["optimizer"]._step_supports_amp_scaling = False
                return made

            module.configure_optimizers = configured
        scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
        plugin = pl.plugins.precision.MixedPrecision("16-mixed", "cuda", scaler)
        results.append(fit(module, [] if by_hand else [NaNEarlyStop(patience=9)], plugins=[plugin]))
    assert poison.differences(*results) == []


@pytest.mark.parametrize("patience", [0, 1])
def test_the_device_holds_all_updates_until_the_host_has_heard_of_the_stop(patience: int) -> None:
    kinds = dict.fromkeys(range(3, 4 + patience), "nan_input")

    class Busy(pl.Callback):
        """The device falls behind, so that the host hears late."""

        def on_train_batch_start(self, *args: Any) -> None:
            torch.cuda._sleep(20_000_000)

    module = poison.make_module(pl, kinds, OPTIMIZERS["AdamW fused"], by_hand=False)
    with pytest.warns(UserWarning, match="NaNEarlyStop ended the run"):
        late = fit(module, [NaNEarlyStop(patience), Busy()], loader=poison.data(200), max_epochs=1)
    shorter = poison.make_module(pl, {}, OPTIMIZERS["AdamW fused"], by_hand=False)
    reference = fit(shorter, [], loader=poison.data(200), max_epochs=1, max_steps=3)
    print(f"patience {patience}: heard of at step {late['step']}")
    assert poison.differences(late["weights"], reference["weights"]) == []


SETTINGS: dict[str, dict[str, Any]] = {
    "32-true": {},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed": {"precision": "16-mixed"},
    "accumulating": {"accumulate_grad_batches": 2},
    "clipping": {"gradient_clip_val": 0.05},
}


def count(optimizer: str, callbacks: list[Any], **options: Any) -> list[int]:
    counter = CountSynchronisations()
    module = poison.make_module(pl, {}, OPTIMIZERS[optimizer], by_hand=False)
    module.log = module.log_dict = lambda *args, **kwargs: None  # Lightning's own logging waits for the device
    type(module).training_step = _quiet(type(module).training_step)
    trainer = runs.trainer(
        pl, accelerator="gpu", callbacks=[counter, *callbacks], logger=runs.memory_logger(pl), **options
    )
    trainer.fit(module, poison.data(16))
    return counter.counts


def _quiet(step: Any) -> Any:
    """Without the metrics, some of which wait for the device; batch norm, buffers and max-norm weights stay."""

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        self.mean.update(batch[0].mean())
        return self.net.head(self.net.encoder(batch[0])).float().pow(2).mean()

    return training_step


@pytest.mark.parametrize("name", SETTINGS)
def test_a_clean_step_with_a_fused_optimizer_waits_for_nothing_more(name: str) -> None:
    bare = count("AdamW fused", [], **SETTINGS[name])
    guarded = count("AdamW fused", [NaNEarlyStop(patience=0), GradNormMonitor()], **SETTINGS[name])
    start = 3 * SETTINGS[name].get("accumulate_grad_batches", 1)
    print(f"{name}: bare {bare[start:]}, guarded {guarded[start:]}")
    assert guarded[start:-1] == bare[start:-1]


def test_a_clean_step_with_another_optimizer_waits_once() -> None:
    bare = count("AdamW foreach", [])
    guarded = count("AdamW foreach", [NaNEarlyStop(patience=0)])
    assert [a - b for a, b in zip(guarded, bare, strict=True)][3:-1] == [1] * (len(bare) - 4)


class TestPrecisionFallback:
    @pytest.mark.parametrize("optimizer", ["AdamW fused", "AdamW foreach"])
    @pytest.mark.parametrize("accumulate", [1, 4])
    def test_it_is_the_run_whose_precision_was_changed_by_hand(self, optimizer: str, accumulate: int) -> None:
        class Change(pl.Callback):
            def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
                if module.batch + 1 == (4 if accumulate == 1 else 0):
                    trainer.strategy.precision_plugin = pl.plugins.precision.Precision()

        kinds = {4 if accumulate == 1 else 2: "large_input"}
        results = []
        for callback in (PrecisionFallback(), Change()):
            module = poison.make_module(pl, kinds, OPTIMIZERS[optimizer], by_hand=False)
            scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
            plugin = pl.plugins.precision.MixedPrecision("16-mixed", "cuda", scaler)
            results.append(fit(module, [callback], plugins=[plugin], accumulate_grad_batches=accumulate))
            if accumulate > 1 or optimizer == "AdamW fused":
                # With a fused optimizer the host hears of the overflow one step late: a callback that averages the
                # weights after the batch has seen them before the batch was trained again.
                del results[-1]["average"]
        assert results[0]["trainer"].precision == "32-true"
        assert poison.differences(*results) == []

    def test_no_memory_for_it_is_one_clear_error_and_leaves_weights_and_the_last_checkpoint_alone(
        self, tmp_path: Path
    ) -> None:
        class Wide(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = torch.nn.Linear(64, 64)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                if x.abs().max() > 1e5 and not torch.is_autocast_enabled("cuda"):
                    torch.empty(2**42, device=x.device)  # what fp32 might ask for
                return self.linear(x)

        class Spoil(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return 6

            def __getitem__(self, index: int) -> torch.Tensor:
                return torch.ones(64) * (1e6 if index == 3 else 1.0)

        module = runs.make_module(
            pl,
            Wide(),
            training_step=lambda self, batch, batch_idx: self.net(batch).float().pow(2).mean(),
            on_before_optimizer_step=lambda self, optimizer: None,
        )
        # (NaNEarlyStop and FractionalCheckpoint must not write when the exception passes them)
        saver = FractionalCheckpoint(1 / 6, dirpath=tmp_path, save_top_k=-1)
        callbacks = [PrecisionFallback(), NaNEarlyStop(patience=0), saver]
        options = {"accelerator": "gpu", "precision": "16-mixed", "enable_checkpointing": True}
        trainer = runs.trainer(pl, callbacks=callbacks, **options)
        with pytest.raises(RuntimeError, match=r"does not fit into memory in 32-true \(about \d+\.\d GiB more"):
            trainer.fit(module, torch.utils.data.DataLoader(Spoil()))
        assert poison.nonfinite(module.state_dict()) == []
        assert not any(layer._forward_hooks for layer in module.net.modules())
        newest = last_good_checkpoint(tmp_path)
        assert all(info.is_good for info in list_checkpoints(tmp_path, verify=True))
        checkpoint = torch.load(newest, weights_only=True)
        assert checkpoint["global_step"] == 3
        for name, value in module.state_dict().items():
            assert torch.equal(value.cpu(), checkpoint["state_dict"][name].cpu()), name

    @pytest.mark.parametrize(("times", "fits"), [(1.5, False), (3.0, True)])
    def test_it_warns_early_if_there_would_be_no_room(self, times: float, fits: bool) -> None:
        """All of the device's memory is really taken, but for so many times what the activations of a step need."""
        width = 4096

        class Take(pl.Callback):
            def __init__(self, room: float | None) -> None:
                self.room, self.taken = room, None

            def on_train_start(self, *args: Any) -> None:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                if self.room is not None:
                    free, _ = torch.cuda.mem_get_info()
                    self.taken = torch.empty(int(free - self.room), dtype=torch.uint8, device="cuda")

            def on_train_batch_end(self, *args: Any) -> None:
                self.rest, self.peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()

        def fit(room: float | None) -> tuple[float, float, list[str]]:
            layers = [torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU()) for _ in range(4)]
            net = torch.nn.Sequential(torch.nn.Linear(6, width), *layers, torch.nn.Linear(width, 1))
            quiet = {"on_before_optimizer_step": lambda self, optimizer: None}
            module = runs.make_module(
                pl, net, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=1e-3, foreach=False), **quiet
            )
            take = Take(room)
            options = {"accelerator": "gpu", "precision": "16-mixed", "max_steps": 3}
            trainer = runs.trainer(pl, callbacks=[take, PrecisionFallback()], **options)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trainer.fit(module, runs.data(3 * 2**15, 2**15))
            take.taken = None
            return take.rest, take.peak - take.rest, [str(w.message) for w in caught]

        rest, activations, said = fit(None)
        assert not any("run out of memory" in text for text in said)
        *_, said = fit(rest + times * activations)
        print([text for text in said if "run out of memory" in text])
        assert any("a fallback would run out of memory" in text for text in said) is not fits

    @pytest.mark.parametrize("precision", ["16-mixed", "16-true"])
    @pytest.mark.parametrize("accumulate", [1, 3])
    def test_a_resume_after_the_change_is_exact(self, tmp_path: Path, precision: str, accumulate: int) -> None:
        options: dict[str, Any] = {
            "max_epochs": 2,
            "accelerator": "gpu",
            "deterministic": True,
            "precision": precision,
            "accumulate_grad_batches": accumulate,
            "fallback": "32-true",
            "module": {"large": 5, "eps": 1e-3},
            "checkpoint": {"every_n_epochs": 0.4},
        }
        try:
            fits.fit(tmp_path, **options)
            assert result(tmp_path)["precision"][0] == "32-true"
            resume_from_all(saved(tmp_path), tmp_path, options)
        finally:
            torch.use_deterministic_algorithms(False)
