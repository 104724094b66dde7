"""Saves on a disk that fails once: each write, flush, rename, link and deletion of a save in turn."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import faulty_fit

TESTS = Path(faulty_fit.__file__).parent
FAILS, FULL, SHORT, HALF_FAILS, DONE_BUT_FAILS = range(5)
FAST = {"steps": [3], "kinds": [FAILS], "options": {"of": 4}}
SOME = {"steps": [3], "kinds": [FAILS, HALF_FAILS, DONE_BUT_FAILS]}
ALL = {"steps": [3, faulty_fit.STEPS], "kinds": [FAILS, FULL, SHORT, HALF_FAILS, DONE_BUT_FAILS]}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("it takes a C compiler and Linux")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, TESTS / "faults.c", "-ldl"], check=True)
    return library


def results(faults: Path, folder: Path, words: dict[str, Any]) -> list[dict[str, Any]]:
    environment = {**os.environ, "LD_PRELOAD": str(faults), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, faulty_fit.__file__, str(folder), json.dumps(words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"step"')]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(FAST, id="fast"),
        pytest.param({**ALL, "options": {}}, id="all", marks=pytest.mark.slow),
        pytest.param({**SOME, "options": {"async_save": True}}, id="in the background", marks=pytest.mark.slow),
        pytest.param({**SOME, "options": {"save_last": "link"}}, id="last is a link", marks=pytest.mark.slow),
    ],
)
def test_one_fault_anywhere_in_a_save_costs_at_most_that_save(
    faults: Path, tmp_path: Path, words: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    met = [result for result in results(faults, tmp_path, words) if "error" in result or result["hit"]]
    of = words["options"].get("of", faulty_fit.STEPS)
    for result in met:
        assert "error" not in result, result
        step, saved = result["step"], list(range(1, of + 1))
        assert result["steps"] == of, result  # training went on
        without = [number - (number == step) for number in saved]
        assert result["found"] in (saved, without), result  # at each step the newest that was saved
        if step < of:
            newest = f"epoch=00{of / faulty_fit.STEPS:.2f}-step={of:06}.ckpt"
            assert result["files"] == [newest, "last.ckpt", "steps.jsonl"], result
    calls = {call for result in met for call in result["hit"].split()}
    assert calls >= {"open64", "write", "fsync", "rename", "unlink"}
    with capsys.disabled():
        print(f" [{len(met)} fault points: {', '.join(sorted(calls))}]", end="")


@pytest.mark.slow
def test_one_fault_anywhere_in_a_stops_save_leaves_the_stop_before_it(
    faults: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = results(faults, tmp_path, {**ALL, "steps": [5], "options": {}, "stop": True})
    met = [result for result in told if "error" in result or result["hit"]]
    for result in met:
        assert "error" not in result, result
        assert result["found"][0] in (3, 6), result
        assert not [name for name in result["files"] if name.endswith(".part")], result
    with capsys.disabled():
        print(f" [{len(met)} fault points of a stop's save]", end="")
    assert len(met) > 20
    assert any(result["found"] == [6] for result in told), "without a fault it is the second stop's"
