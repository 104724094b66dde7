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
        meter.measure({}, force=True)
        meter.send(reads, lambda measured: norms.append(float(measured.grad_norms[0])))
    reads.drain()
    assert norms == pytest.approx([3**0.5 * 1e25, float("inf"), 3**0.5 * 2.0], rel=1e-6)


@pytest.mark.parametrize("every", [1, 8])
@pytest.mark.parametrize("drives_clipping", [False, True])
def test_what_is_read_late_is_what_was_measured(every: int, drives_clipping: bool) -> None:
    """The device lags behind, memory is used again and again: each read still gets its own step's numbers.

    Some steps' norms are asked for at once, as a guard does, and the others' are not.
    """
    weights = [torch.nn.Parameter(torch.zeros(1, device="cuda")) for _ in range(3)]
    names = {weight: str(index) for index, weight in enumerate(weights)}
    meter = GradientMeter(torch.optim.SGD(weights, lr=0.1), names, drives_clipping)
    reads, seen, vectors = LateReads(every), [], []
    gradients = [[torch.full((1,), float(10 * i + step), device="cuda") for i in range(3)] for step in range(50)]
    losses = [torch.tensor(-float(step), device="cuda", dtype=torch.bfloat16) for step in range(50)]
    scale = torch.ones((), device="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    for step in range(50):
        for weight, gradient in zip(weights, gradients[step], strict=True):
            weight.grad = gradient
        meter.measure({"loss_scale": scale}, {"loss": losses[step]})
        scale.add_(1.0)
        if step % 3:
            vectors.append((step, meter.norms))
        meter.send(reads, lambda m: seen.append((m.grad_norms.tolist(), m.scalars)))
        reads.poll()
    assert seen == [], "nothing was late: make the device slower"
    reads.drain()
    assert len(reads) == 0
    assert [norms for norms, _ in seen] == [[float(10 * i + step) for i in range(3)] for step in range(50)]
    assert [scalars for _, scalars in seen] == [{"loss": -float(s), "loss_scale": 1.0 + s} for s in range(50)]
    assert all(vector.tolist() == seen[step][0] for step, vector in vectors)


@pytest.mark.parametrize("drives_clipping", [False, True])
def test_a_loss_scale_comes_back_to_the_last_bit(drives_clipping: bool) -> None:
    weight = torch.nn.Parameter(torch.zeros(3, device="cuda"))
    meter = GradientMeter(torch.optim.SGD([weight], lr=0.1), {}, drives_clipping)
    reads, seen = LateReads(every=4), []
    scales = [65536.0, 2.0**-120, 1e-40, 0.0, 1.0 / 3.0, 3e38, float("inf"), 12345.678]
    scale = torch.zeros((), device="cuda")
    for value in scales:
        weight.grad = torch.ones(3, device="cuda")
        scale.fill_(value)
        meter.measure({"loss_scale": scale})
        meter.send(reads, lambda m: seen.append(m.scalars["loss_scale"]))
    reads.drain()
    assert seen == torch.tensor(scales).tolist()


def test_a_gradient_that_comes_and_goes_beside_a_loss_scale() -> None:
    weights = [torch.nn.Parameter(torch.zeros(size, device="cuda")) for size in (4, 9)]
    names = {weight: str(index) for index, weight in enumerate(weights)}
    meter = GradientMeter(torch.optim.SGD(weights, lr=0.1), names, drives_clipping=False)
    reads, seen = LateReads(every=8), []
    scale = torch.tensor(8.0, device="cuda")
    for present in (True, False, True, False):
        weights[0].grad = torch.ones(4, device="cuda")
        weights[1].grad = torch.ones(9, device="cuda") if present else None
        meter.measure({"loss_scale": scale})
        meter.send(reads, lambda m: seen.append((m.grad_norms.tolist(), m.scalars["loss_scale"])))
    reads.drain()
    assert seen == [([2.0, 3.0], 8.0), ([2.0, 0.0], 8.0)] * 2


def meter_of(gradients: list[Any], drives_clipping: bool = False) -> tuple[GradientMeter, list[Any]]:
    weights = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    names = {weight: str(index) for index, weight in enumerate(weights)}
    return GradientMeter(torch.optim.SGD(weights, lr=0.1), names, drives_clipping), weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_norms_of_each_dtype_equal_those_of_float64(dtype: torch.dtype) -> None:
    sizes = (1, 7, 1000, 2**14, 2**14 + 1, 3_000_001, 0)
    values = [torch.randn(size, device="cuda").to(dtype) for size in sizes]
    memory = torch.randn(50_001, device="cuda").to(dtype)
    values += [memory[1:], torch.randn(8, 3, 5, 5, device="cuda").to(dtype, memory_format=torch.channels_last)]
    meter, weights = meter_of(values)
    expected = [float(value.double().norm()) for value in values]
    for step in range(6):
        if step % 2:  # at other addresses
            for weight in weights:
                weight.grad = weight.grad.clone(memory_format=torch.preserve_format)
        meter.measure({}, force=True)
        assert meter.norms.tolist() == pytest.approx(expected, rel=1e-6)
        assert float(meter.total_norm()) == pytest.approx(math.hypot(*expected), rel=1e-6)


def test_gradients_of_any_kind_in_turn() -> None:
    """Absent, expanded, sparse, with gaps, in another place: each step's norms are its own, whatever the way."""
    meter, weights = meter_of([torch.ones(4, device="cuda"), torch.ones(6, device="cuda")])
    ones = torch.ones(6, device="cuda")
    gradients = [ones, None, ones[:1].expand(6), ones.to_sparse(), torch.ones(12, device="cuda")[::2], ones * 2, None]
    reads, seen = LateReads(every=4), []
    for gradient in gradients * 3:
        weights[1].grad = gradient
        meter.measure({"loss_scale": torch.tensor(8.0, device="cuda")}, {"loss": torch.tensor(-1.0, device="cuda")})
        assert float(meter.total_norm()) == pytest.approx(math.hypot(*meter.norms.tolist()))
        meter.send(reads, lambda m: seen.append((m.grad_norms[1] ** 2, m.scalars)))
    reads.drain()
    assert [square for square, _ in seen] == pytest.approx([6.0, 0.0, 6.0, 6.0, 6.0, 24.0, 0.0] * 3)
    assert all(scalars == {"loss_scale": 8.0, "loss": -1.0} for _, scalars in seen)


def test_addresses_that_change_while_the_device_lags_behind() -> None:
    meter, weights = meter_of([torch.ones(4, device="cuda") for _ in range(3)])
    steps = [[torch.full((4,), float(3 * step + i), device="cuda") for i in range(3)] for step in range(100)]
    meter.measure({}, force=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    vectors = []
    for gradients in steps:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        meter.measure({}, force=True)
        vectors.append(meter.norms)
    assert [v.tolist() for v in vectors] == [[2.0 * (3 * step + i) for i in range(3)] for step in range(100)]


def test_a_tensor_of_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    weight = torch.nn.Parameter(torch.empty(2**31 + 2**14 + 5, device="cuda", dtype=torch.bfloat16))
    weight.grad = torch.zeros_like(weight)
    weight.grad[-1] = 3.0
    weight.grad[2**31 + 1] = 4.0
    meter = GradientMeter(torch.optim.SGD([weight], lr=0.1), {}, drives_clipping=False)
    meter.measure({}, force=True)
    assert meter.norms.tolist() == [5.0]


def test_the_norms_of_a_step_take_one_pass() -> None:
    """One multi-tensor norm: not a kernel per parameter."""
    weights = [torch.nn.Parameter(torch.zeros(64, device="cuda")) for _ in range(100)]
    for weight in weights:
        weight.grad = torch.ones(64, device="cuda")
    meter = GradientMeter(torch.optim.SGD(weights, lr=0.1), {}, drives_clipping=False)
    reads = LateReads(every=8)
    loss, scale = torch.ones((), device="cuda"), torch.ones((), device="cuda")

    def kernels(function: Any) -> float:
        """Kernels and copies of one step, the mean of eight."""
        for _ in range(8):
            function()
        reads.drain()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(8):
                function()
            torch.cuda.synchronize()
        return sum(event.count for event in profiler.key_averages() if event.device_type.name == "CUDA") / 8

    def ours() -> None:
        meter.measure({"loss_scale": scale}, {"loss": loss})
        meter.send(reads, lambda measured: None)

    bare = kernels(lambda: torch._foreach_norm([weight.grad for weight in weights]))
    print(f"kernels of a bare pass {bare}, of ours {kernels(ours)}")
    assert 0 < kernels(ours) < bare + 3
