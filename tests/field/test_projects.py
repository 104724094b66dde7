"""Projects of others train as they do without the package, and a bad batch does not land.

They need an environment of their own, without `constraints.txt`: "Versions" in CONTRIBUTING.md says how to install it.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from lightning_stability.events import read_events

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROJECTS = {"chemprop": "chemprop_fit", "pytorch_tabular": "tabular_fit", "pytorch_forecasting": "forecasting_fit"}
SAME = ("weights", "optimizers", "random", "step", "epoch", "metrics")


@dataclass
class Outcome:
    code: int
    result: dict
    said: str
    events: list


@pytest.fixture(params=PROJECTS)
def project(request):
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return PROJECTS[request.param]


@functools.cache
def fit(project, form, bad=False):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.field.fit", project, form, folder, *(["bad"] if bad else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        events = [event for path in Path(folder).rglob("events.jsonl") for event in read_events(path.parent)]
        result = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
        return Outcome(done.returncode, result, done.stderr, events)


@pytest.mark.parametrize("form", ["installed", "code"])
def test_a_healthy_training_is_the_same_to_the_bit(project, form):
    bare, ours = fit(project, "none"), fit(project, form)
    assert bare.code == ours.code == 0, bare.said + ours.said
    assert {name: ours.result[name] for name in SAME} == {name: bare.result[name] for name in SAME}
    assert "disables itself" not in ours.said
    assert (form == "code") == any(event["event"] == "training_started" for event in ours.events)


def test_without_the_package_the_bad_batch_lands_or_ends_the_run(project):
    bare = fit(project, "none", bad=True)
    assert bare.code != 0 or not bare.result["finite"]


@pytest.mark.parametrize("form", ["installed", "code"])
def test_a_bad_batch_does_not_land_and_is_named(project, form):
    ours = fit(project, form, bad=True)
    assert ours.code == 0, ours.said
    assert (ours.result["finite"], ours.result["finite_state"], ours.result["nonfinite_metrics"]) == (True, True, [])
    [skipped] = [event for event in ours.events if event["event"] == "update_skipped"]
    assert (skipped["epoch"], skipped["batch_idx"], skipped["what"]) == (0, 2, "input")
    assert "1 skipped" in ours.said
    sample = {"chemprop_fit": "sample 3", "tabular_fit": "sample 1", "forecasting_fit": "sample 1"}[project]
    assert f"({sample}, column 0) (epoch 0, batch 2" in ours.said
