"""930,495 windows of 2,993 recordings, 36 GB: what the crash report's run waited for before its first step."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightning_stability.tuab import WindowCache
from tests.tuab import real_size

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    base = tmp_path_factory.mktemp("real_size")
    folder = real_size.write_sparse_cache(base / "tuab", base / "cache")
    return base / "tuab", base / "cache", folder


@contextmanager
def counted_calls() -> Iterator[list[int]]:
    """How many functions are called, which says how the work grows and does not depend on other work on the machine."""
    calls = [0]

    def count(frame: Any, event: str, arg: Any) -> None:
        calls[0] += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def test_a_cache_of_930_495_windows_opens_by_reading_its_index(folders: tuple[Path, Path, Path]) -> None:
    assert (folders[2] / "samples.f16").stat().st_size > 36e9
    real_size.open_cache(folders[2])  # what is imported on the way is not read again
    before = real_size.read_bytes()
    with counted_calls() as calls:
        dataset = real_size.open_cache(folders[2])
    assert real_size.read_bytes() - before < 2 * (folders[2] / "index.jsonl").stat().st_size
    assert calls[0] < 10 * real_size.RECORDINGS, "its work is one of recordings, not of windows"
    assert len(dataset) == real_size.WINDOWS
    assert dataset[real_size.WINDOWS - 1]["eeg"].shape == (19, 2048)


@pytest.mark.parametrize("balanced", [False, True])
def test_the_first_step_reads_one_batch_and_gains_less_than_100_mb(
    folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, balanced: bool
) -> None:
    read, windows = WindowCache.read, []

    def counted(*args: Any) -> Any:
        windows.append(args[1:])
        return read(*args)

    monkeypatch.setattr(WindowCache, "read", counted)
    with counted_calls() as calls:
        result = real_size.first_step(folders[0], folders[1], workers=0, balanced=balanced)
    assert len(windows) == real_size.OPTIONS["batch_size"]
    with counted_calls() as with_a_tenth:
        real_size.first_step(folders[0], folders[1], workers=0, balanced=balanced, stride_seconds=40.0)
    assert abs(calls[0] - with_a_tenth[0]) < 0.1 * real_size.WINDOWS, "nothing is called once a window"
    assert result["train_windows"] > 925_000
    assert result["estimated_stepping_batches"] == -(-result["train_windows"] // 32)
    assert result["rss_growth_mb"] < 100


@pytest.mark.slow
@pytest.mark.parametrize("balanced", [0, 1])
def test_in_a_new_process_with_workers_the_main_process_gains_less_than_100_mb(
    folders: tuple[Path, Path, Path], balanced: int
) -> None:
    done = subprocess.run(
        [sys.executable, real_size.__file__, str(folders[0]), str(folders[1]), "2", str(balanced)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["rss_growth_mb"] < 100
