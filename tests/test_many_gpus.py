"""On all GPUs of the machine over NCCL (and on two processes of a CPU): what one rank has, all ranks answer alike.

torchrun starts the ranks, as it does for users: when one dies, it ends the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_stability.checkpointing import list_checkpoints
from lightning_stability.diagnosis import diagnose, read_incident
from tests import runs
from tests.distributed_many import BAD, adamw
from tests.recovery import poison

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("distributed_many.py")
GPUS = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]
DEVICES = ["cpu", pytest.param("gpu", marks=GPUS)]
STRATEGIES = ["ddp", "fsdp2"]
SCENARIOS = ("batch", "loss", "gradient", "overflow", "stop", "incident", "spikes")
LIMIT = 120.0
"""Seconds within which all ranks have ended after one has."""


class Ended(Exception):
    """Not all ranks ended well."""


def launch(folder: Path, device: str, strategy: str, *names: str, ranks: int = 0, **environment: str) -> None:
    """Run scenarios on all ranks, or on so many; raise `Ended` with their output if one fails."""
    ranks = ranks or ranks_of(device)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    paths = os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parents[1])])
    with (folder / "log.txt").open("a") as log:
        status = subprocess.run(
            [*command, str(SCRIPT), strategy, device, str(folder), *names],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=900,
            check=False,
        ).returncode
    if status:
        raise Ended((folder / "log.txt").read_text()[-6000:])


def ranks_of(device: str) -> int:
    return torch.cuda.device_count() if device == "gpu" else 2


def results(folder: Path, name: str, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(ranks)]


# Faults that the run survives: one launch has them all, one after the other.


class Faults:
    def __init__(self, folder: Path, device: str, strategy: str) -> None:
        self.folder, self.ranks, self.strategy, self.ended = folder, ranks_of(device), strategy, ""
        more = ("reduced_gradient",) if strategy == "fsdp2" else ()
        try:
            launch(folder, device, strategy, *SCENARIOS, *more)
        except Ended as error:
            self.ended = str(error)

    def of(self, name: str) -> list[dict[str, Any]]:
        if not (self.folder / f"{name}-0.json").exists():
            pytest.fail(f"{name}: the ranks did not come to its end\n{self.ended}")
        return results(self.folder, name, self.ranks)


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# (a worker of pytest-xdist has all tests of one launch)
GROUPS = [pytest.param(name, marks=pytest.mark.xdist_group(f"many-{name}")) for name in STRATEGIES]


@pytest.fixture(scope="module", params=GROUPS)
def faults(request: pytest.FixtureRequest, device: str, tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp(f"{device}-{request.param}"), device, request.param)


def assert_alike(ranks: list[dict[str, Any]]) -> None:
    assert len({json.dumps([rank["step"], rank["sum"]]) for rank in ranks}) == 1, ranks
    assert all(rank["bad"] == [] for rank in ranks)


@pytest.mark.parametrize("what", ["batch", "loss", "gradient", "reduced_gradient"])
def test_a_fault_of_one_rank_is_skipped_by_all(faults: Faults, what: str) -> None:
    if what == "reduced_gradient" and faults.strategy == "ddp":
        pytest.skip("no other rank can see it: that ends the run (below)")
    ranks = faults.of(what)
    assert_alike(ranks)
    for rank in ranks:
        assert rank["differences"] == []
        assert rank["reference"] == {key: rank[key] for key in ("step", "sum", "bad")}


def test_all_ranks_leave_fp16_at_the_step_that_overflows_on_one(faults: Faults) -> None:
    ranks = faults.of("overflow")
    if faults.strategy == "fsdp2":
        assert all("cannot change the precision under ModelParallelStrategy" in rank["refused"] for rank in ranks)
        return
    assert_alike(ranks)
    for rank in ranks:
        assert (rank["differences"], rank["precision"], rank["changed_at"]) == ([], "32-true", BAD)


def test_all_ranks_stop_at_the_step_that_is_bad_on_one(faults: Faults) -> None:
    ranks = faults.of("stop")
    assert_alike(ranks)
    assert ranks[0]["step"] in (BAD + 1, BAD + 2)  # on a GPU the host hears of it one step later; that one is held back
    assert f"global step {BAD}, rank {faults.ranks - 1}" in ranks[0]["said"][0]
    assert all(rank["said"] == [] for rank in ranks[1:])


def test_all_ranks_skip_and_rewind_at_the_same_steps(faults: Faults) -> None:
    ranks = faults.of("spikes")
    assert all(rank == ranks[0] for rank in ranks)
    usual, broken = ranks[0]["broken=False"], ranks[0]["broken=True"]
    assert (usual["spikes"], usual["rewinds"]) == (1, 0)
    assert (broken["spikes"], broken["rewinds"]) == (1, 1)
    back = 81 - broken["left_out"]
    assert broken["sums"][80] == usual["sums"][back - 1]


def test_an_incident_changes_nothing_and_is_replayed_elsewhere(faults: Faults) -> None:
    ranks = faults.of("incident")
    assert_alike(ranks)
    for rank in ranks:
        assert rank["differences"] == []
        assert rank["reference"] == {key: rank[key] for key in ("step", "sum", "bad")}
    written = sorted((faults.folder / faults.strategy / "incidents").iterdir())
    if faults.strategy == "fsdp2":  # no rank can tell whether it was its own batch
        notes = [json.loads((folder / "report.json").read_text())["notes"] for folder in written]
        assert notes == [["the parameters are sharded over several ranks; a replay needs all of them on one"]] * len(
            ranks
        )
        return
    [folder] = written
    assert read_incident(folder).about["trainer"]["global_rank"] == faults.ranks - 1
    # in one process, without the others
    pl = runs.load_namespace("pytorch_lightning")
    again = diagnose(folder, module=lambda: poison.make_module(pl, {BAD: "nan_gradient"}, adamw, by_hand=False))
    assert again["reproduced"]
    assert again["origin"]["op"] == "sqrt"


# Faults that end it.


def test_a_gradient_spoilt_after_ddps_reduction_ends_all_ranks(tmp_path: Path, device: str) -> None:
    began = time.monotonic()
    with pytest.raises(Ended):
        launch(tmp_path, device, "ddp", "late_gradient")
    assert time.monotonic() - began < LIMIT
    last = ranks_of(device) - 1
    found = json.loads((tmp_path / f"said-{last}.json").read_text())  # of its RanksDisagreeError
    assert f"not finite on rank {last}" in found["said"]
    assert found["bad"] == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_after_a_kill_of_one_rank_a_resume_is_exact(tmp_path: Path, device: str, strategy: str) -> None:
    ranks = ranks_of(device)
    launch(tmp_path, device, strategy, "undisturbed")
    began = time.monotonic()
    with pytest.raises(Ended, match="SIGKILL"):
        launch(tmp_path, device, strategy, "killed")
    assert time.monotonic() - began < LIMIT, "the other ranks hung"
    path = list_checkpoints(tmp_path / "checkpoints")[-1].path
    launch(tmp_path, device, strategy, "resumed", CKPT_PATH=str(path))
    undisturbed, resumed = (results(tmp_path, name, ranks) for name in ("undisturbed", "resumed"))
    assert resumed == undisturbed
    assert_alike(resumed)
    # on another number of ranks
    launch(tmp_path, device, strategy, "resumed", ranks=ranks // 2, CKPT_PATH=str(path))
    others = results(tmp_path, "resumed", ranks // 2)
    assert_alike(others)
    assert others[0]["step"] > 0
    assert f"are dealt out anew, each once: 12 batches on each of {ranks // 2} processes" in others[0]["said"][0]
