"""What many tests take: a namespace of Lightning, corpora, the command line."""

from __future__ import annotations

import gc
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from lightning_stability.tuab import SyntheticCorpus
from tests import checkpoint_fit as fits
from tests import runs
from tests.command import Launcher, launcher

# An editable install has the entry points too: without this, every Trainer of every test, in processes that tests
# start too, would have the automatic callbacks. `tests/plugin` sets it as it needs it.
os.environ["LIGHTNING_STABILITY_CALLBACKS"] = "none"

# The collector need not go through all that is imported here, many times what a test makes.
gc.freeze()

# No example has a deadline, and none is too slow: how long one takes says how busy the machine is.
settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")

collect_ignore = [
    "distributed_fit.py",
    "distributed_inputs.py",
    "distributed_look.py",
    "checkpoint_fit.py",
    "distributed_incident.py",
    "faulty_fit.py",
]  # scripts that tests start


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """A test begins with the same random state whichever ran before it; slow ones may draw moments of their own."""
    torch.default_generator.manual_seed(0)
    np.random.seed(0)
    if request.node.get_closest_marker("slow") is None:
        random.seed(0)


@pytest.fixture
def no_group_left() -> Iterator[None]:
    """A process group of the test is gone behind it, and what refers to the group.

    Else the collector of a process that is forked later, such as a loader's worker, may end it by what it frees:
    threads of the group that this process alone has.
    """
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    gc.collect()


@pytest.fixture(params=runs.NAMESPACES)
def pl(request: pytest.FixtureRequest) -> Any:
    """Lightning, in each of its namespaces."""
    return runs.load_namespace(request.param)


@pytest.fixture
def one() -> Any:
    """Lightning in one namespace, for what cannot differ between the two."""
    return runs.load_namespace("pytorch_lightning")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small intact corpus; nobody writes to it."""
    small = SyntheticCorpus(train_subjects=12, eval_subjects=4, seconds=(24, 30))
    return small.write(tmp_path_factory.mktemp("corpora") / "small")


@pytest.fixture(scope="session")
def cached(corpus: Path) -> list[str]:
    """The options for a small corpus whose recordings only the first command preprocesses."""
    return [f"--data.root={corpus}", f"--data.cache_dir={corpus.parent / 'cache'}"]


@pytest.fixture(scope="session")
def damaged_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus with artefacts in four recordings and one broken file."""
    damaged = SyntheticCorpus(train_subjects=12, eval_subjects=4, seconds=(24, 30), artefacts=4, broken=1, seed=1)
    return damaged.write(tmp_path_factory.mktemp("corpora") / "damaged")


@pytest.fixture(scope="session")
def command() -> Launcher:
    """Runs the command line, each time in a process of its own."""
    return launcher()


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Diagnoses write neither a script nor a page."""
    from tests.diagnosis.brief import CHANGES

    for change in CHANGES:
        monkeypatch.setattr(*change)


@pytest.fixture(scope="session")
def processes() -> Iterator[fits.Fits]:
    """Runs fits, each in a process of its own that can be killed."""
    launcher = fits.Fits()
    yield launcher
    launcher.close()


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A disk of 256 kB, or of as many as the test says."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', 256)}k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
