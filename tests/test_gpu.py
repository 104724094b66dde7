"""On a GPU: right values, and no synchronisation that a bare Trainer would not have had."""

import math
import warnings
from typing import Any

import pytest
import torch

from lightning_stability import GradNormMonitor
from lightning_stability.health import GradientMeter, LateReads
from tests import runs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
pl = runs.load_namespace("pytorch_lightning")

SETTINGS = {
    "32-true": {},
    "32-true fused": {"fused": True},
    "32-true clipping": {"gradient_clip_val": 0.05},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed": {"precision": "16-mixed"},
    "16-mixed fused": {"precision": "16-mixed", "fused": True},
    "16-mixed clipping": {"precision": "16-mixed", "gradient_clip_val": 0.05},
    "16-mixed accumulating": {"precision": "16-mixed", "accumulate_grad_batches": 2},
    "bf16-true": {"precision": "bf16-true"},
}


def fit(module: Any, settings: dict[str, Any], callbacks: list[Any], **options: Any) -> Any:
    options = {**{k: v for k, v in settings.items() if k != "fused"}, **options}
    trainer = runs.trainer(pl, accelerator="gpu", callbacks=callbacks, **options)
    trainer.fit(module, runs.data(64))
    return trainer


def module_for(settings: dict[str, Any], **overrides: Any) -> Any:
    fused = settings.get("fused")
    return runs.make_module(
        pl, optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, fused=fused), **overrides
    )


class CountSynchronisations(pl.Callback):
    """How often the host waited for the device in each step, from one batch's start to the next one's."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self._caught: Any = None

    def on_train_batch_start(self, *args: Any) -> None:
        self._note()
        self._context = warnings.catch_warnings(record=True)
        self._caught = self._context.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def on_train_end(self, *args: Any) -> None:
        self._note()

    def _note(self) -> None:
        torch.cuda.set_sync_debug_mode("default")
        if self._caught is not None:
            self.counts.append(sum("synchronizing CUDA operation" in str(w.message) for w in self._caught))
            self._context.__exit__(None, None, None)
            self._caught = None


def count(settings: dict[str, Any], callbacks: list[Any], **options: Any) -> list[int]:
    counter = CountSynchronisations()
    module = module_for(settings, on_before_optimizer_step=lambda self, optimizer: None)
    fit(module, settings, [counter, *callbacks], logger=runs.memory_logger(pl), max_steps=12, **options)
    return counter.counts


@pytest.mark.parametrize("name", SETTINGS)
def test_no_synchronisation_is_added_to_any_step(name: str) -> None:
    settings = SETTINGS[name]
    bare = count(settings, [], log_every_n_steps=4)
    assert len(bare) >= 12
    # From the third batch on: the first ones allocate, compile and start the scaler.
    start = 2 * settings.get("accumulate_grad_batches", 1)
    for interval in (10**6, 4, 1):
        monitored = count(settings, [GradNormMonitor(every_n_steps=interval)], log_every_n_steps=4)
        print(f"{name}, every {interval}: bare {bare[start:]}, with the monitor {monitored[start:]}")
        assert monitored[start:-1] == bare[start:-1]


def test_the_count_sees_a_host_read() -> None:
    class Read(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            next(pl_module.parameters()).grad.norm().item()

    assert [a - b for a, b in zip(count({}, [Read()]), count({}, []), strict=True)][2:-1] == [1] * 9


@pytest.mark.parametrize("name", SETTINGS)
def test_values_are_those_of_float64(name: str) -> None:
    settings = SETTINGS[name]
    logger = runs.memory_logger(pl)
    module = module_for(settings)
    fit(module, settings, [GradNormMonitor()], logger=logger)
    assert len(logger.rows) == len(module.copies) > 0
    for (_, row), copies in zip(logger.rows, module.copies, strict=True):
        for group, norm in runs.reference_norms(copies, 2).items():
            if math.isfinite(norm):
                assert row[f"grad_norm/{group}"] == pytest.approx(norm, rel=1e-3 if "true" in name else 1e-4)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_clipping_gives_the_same_bits_as_without_the_monitor(precision: str) -> None:
    weights = []
    for callbacks in ([], [GradNormMonitor()]):
        module = module_for({})
        settings = {"precision": precision, "gradient_clip_val": 0.01}
        fit(module, settings, callbacks, logger=runs.memory_logger(pl))
        weights.append(torch.nn.utils.parameters_to_vector(module.parameters()).detach().cpu())
    assert torch.equal(*weights)


def test_overflow_and_infinity_are_told_apart() -> None:
    weight = torch.nn.Parameter(torch.zeros(3, device="cuda"))
    meter = GradientMeter(torch.optim.SGD([weight], lr=0.1), {}, drives_clipping=False)
    reads, norms = LateReads(), []
    for value in (1e25, float("inf"), 2.0):
        weight.grad = torch.full((3,), value, device="cuda")
        meter.measure({})
        meter.send(reads, lambda measured: norms.append(float(measured.grad_norms[0])))
    reads.drain()
    assert norms == pytest.approx([3**0.5 * 1e25, float("inf"), 3**0.5 * 2.0], rel=1e-6)


def test_what_is_read_late_is_what_was_measured() -> None:
    """The device lags behind, its buffer is written again and again: each read still gets its own step."""
    weight = torch.nn.Parameter(torch.zeros(1, device="cuda"))
    meter = GradientMeter(torch.optim.SGD([weight], lr=0.1), {}, drives_clipping=False)
    reads, norms = LateReads(), []
    values = [torch.full((1,), float(step), device="cuda") for step in range(50)]
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    for value in values:
        weight.grad = value
        meter.measure({"loss": value[0]})
        meter.send(reads, lambda m: norms.append((float(m.grad_norms[0]), m.scalars["loss"])))
        reads.poll()
    assert norms == [], "nothing was late: make the device slower"
    reads.drain()
    assert norms == [(float(step), float(step)) for step in range(50)]


def test_the_norms_of_a_step_take_one_pass() -> None:
    """One multi-tensor norm: not a kernel per parameter."""
    weights = [torch.nn.Parameter(torch.zeros(64, device="cuda")) for _ in range(100)]
    for weight in weights:
        weight.grad = torch.ones(64, device="cuda")
    meter = GradientMeter(torch.optim.SGD(weights, lr=0.1), {}, drives_clipping=False)
    reads = LateReads()

    def once() -> None:
        meter.measure({"loss": torch.ones((), device="cuda")})
        meter.send(reads, lambda measured: None)
        reads.drain()

    once()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        once()
    kernels = sum(event.count for event in profiler.key_averages() if event.device_type.name == "CUDA")
    assert 0 < kernels < 20
