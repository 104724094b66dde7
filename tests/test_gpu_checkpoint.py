"""On a GPU: exact resumes with deterministic algorithms, a finite check of few launches, snapshots that are right."""

import os
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_stability.checkpointing.snapshot import HostSnapshot
from lightning_stability.health.values import NonfiniteLook, nonfinite_names
from lightning_stability.recovery.random_state import RandomState
from tests import checkpoint_fit as fits
from tests.callbacks.test_fractional_checkpoint import result, resume_from_all, saved

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products need
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SETTINGS: dict[str, dict[str, Any]] = {
    "32-true": {},
    "16-mixed": {"precision": "16-mixed"},
    "16-mixed accumulating": {"precision": "16-mixed", "accumulate_grad_batches": 4},
    "bf16-mixed in the background": {"precision": "bf16-mixed", "checkpoint": {"async_save": True}},
    "in the background": {"checkpoint": {"async_save": True}},
    "unknown length": {"data": "stream", "checkpoint": {"steps_per_epoch": 8}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resume_is_exact_with_deterministic_algorithms(tmp_path: Path, name: str) -> None:
    options = {"max_epochs": 2, "accelerator": "gpu", "deterministic": True, **SETTINGS[name]}
    options["checkpoint"] = {"every_n_epochs": 0.4, **options.get("checkpoint", {})}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fits.fit(tmp_path, **options)
            assert result(tmp_path)["global_step"] > 0
            resume_from_all(saved(tmp_path), tmp_path, options)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_devices_random_state_comes_back() -> None:
    torch.rand(1, device="cuda")
    state = RandomState.capture().state_dict()
    first = torch.rand(100, device="cuda")
    torch.cuda.manual_seed(5)
    RandomState.from_state_dict(state).restore()
    assert torch.equal(first, torch.rand(100, device="cuda"))


def test_a_snapshot_is_of_the_moment_it_was_taken_and_pinned() -> None:
    weights = [torch.full((2**20,), float(index), device="cuda") for index in range(8)]
    snapshot = HostSnapshot()
    for repeat in range(3):
        expected = [float(weight[0]) for weight in weights]
        torch.cuda._sleep(50_000_000)  # the copies queue behind this
        taken, wait = snapshot.take({"weights": weights})
        for weight in weights:
            weight.add_(1.0)
        wait()
        assert [float(copy.unique()) for copy in taken["weights"]] == expected
        assert all(copy.is_pinned() for copy in taken["weights"]), repeat


def test_what_changes_after_its_copy_was_begun_waits_for_the_copy() -> None:
    weights = [torch.full((2**20,), float(index), device="cuda") for index in range(8)]
    snapshot = HostSnapshot()
    for repeat in range(3):
        expected = [float(weight[0]) + 1 for weight in weights]
        torch.cuda._sleep(50_000_000)
        for weight in weights:
            weight.add_(1.0)
        snapshot.begin(weights)
        for weight in weights:
            weight.add_(1.0)
        taken, wait = snapshot.take({"weights": weights})
        wait()
        assert [float(copy.unique()) for copy in taken["weights"]] == expected, repeat


def test_what_was_looked_for_before_a_copy_is_known_before_it_ends() -> None:
    weights = [("weight", torch.full((2**28,), float("nan"), device="cuda"))]
    memory = torch.empty(2**28, pin_memory=True)
    ended = torch.cuda.Event()
    look = NonfiniteLook(weights)
    memory.copy_(weights[0][1], non_blocking=True)
    memory.copy_(weights[0][1], non_blocking=True)
    ended.record()
    assert look.names() == ["weight"]
    assert not ended.query()


def test_the_finite_check_takes_few_launches_and_one_wait() -> None:
    tensors = [(f"weight {index}", torch.ones(1000, device="cuda")) for index in range(300)]
    assert nonfinite_names(tensors) == []
    tensors[170][1][3] = float("nan")
    tensors[200][1][999] = -float("inf")
    assert nonfinite_names(tensors) == ["weight 170", "weight 200"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        nonfinite_names(tensors)
    events = [event for event in profiler.key_averages() if event.device_type.name == "CUDA"]
    assert 0 < sum(event.count for event in events) < 20
    assert sum(event.count for event in events if "DtoH" in event.key) == 1


def test_training_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that takes seconds does not hold up the steps after it."""
    import time

    from lightning_stability.checkpointing import writing

    write, times = writing.write_file, []

    def slowly(state: Any, path: str) -> None:
        time.sleep(2.0)
        write(state, path)

    def clock(pl: Any) -> list[Any]:
        class Clock(pl.Callback):
            def on_train_batch_end(self, *args: Any) -> None:
                times.append(time.perf_counter())

        return [Clock()]

    monkeypatch.setattr(writing, "write_file", slowly)
    options = {"every_n_epochs": 4 / 7, "async_save": True}
    fits.fit(tmp_path, max_epochs=1, accelerator="gpu", validate=False, checkpoint=options, callbacks=clock)
    assert max(b - a for a, b in pairwise(times)) < 1.5
    assert len(saved(tmp_path)) == 2
