"""The norms on two ranks, in real processes: DDP, FSDP2, and every placement that a DTensor can have."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import runs
from tests.command import launcher, run_python

SCRIPT = Path(__file__).with_name("distributed_fit.py")


def two_ranks(
    tmp_path: Path, kind: str, namespace: str, *words: str, launch_both: bool = False, script: Path = SCRIPT
) -> list[dict[str, Any]]:
    """Run a script in two processes, or in one of which Lightning starts the second; return what each rank wrote."""
    command = [str(script), kind, namespace, str(tmp_path), *words]
    if launch_both:
        done = launcher().ranks(*command, cwd=tmp_path, env={"OMP_NUM_THREADS": "1"})
    else:
        done = [run_python(*command, cwd=tmp_path, timeout=600)]
    for each in done:
        assert each.returncode == 0, each.stdout[-3000:] + each.stderr[-3000:]
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]


SLOW = [
    pytest.param(kind, namespace, marks=pytest.mark.slow)
    for kind in ("ddp", "ddp-clip", "fsdp2", "fsdp2-clip")
    for namespace in runs.NAMESPACES
    if (kind, namespace) != ("ddp", "pytorch_lightning")
]


@pytest.mark.parametrize(("kind", "namespace"), [("ddp", "pytorch_lightning"), *SLOW])
def test_two_ranks(tmp_path: Path, kind: str, namespace: str) -> None:
    results = two_ranks(tmp_path, kind, namespace)
    rows, references = results[0]["rows"], results[0]["references"]
    assert len(rows) == len(references) > 1
    assert results[1]["rows"] == [], "rank 0 logs"
    for rank, result in enumerate(results):
        totals = [reference["total"] for reference in references]
        assert result["totals"] == pytest.approx(totals, rel=1e-4), f"rank {rank}"
    for row, reference, clipped in zip(rows, references, results[0]["clipped"], strict=True):
        for name, norm in reference.items():
            assert row[f"grad_norm/{name}"] == pytest.approx(norm, rel=1e-4)
        assert 0 < row["update_ratio/net.encoder"] < 1
        if kind.endswith("clip"):
            assert reference["total"] > 0.05
            assert row["grad_norm/clip_coefficient"] == pytest.approx(0.05 / reference["total"], rel=1e-3)
            assert clipped == pytest.approx(0.05, rel=1e-3)
        else:
            assert clipped == pytest.approx(reference["total"], rel=1e-4)


def test_sharded_replicated_and_unreduced_gradients(tmp_path: Path) -> None:
    for result in two_ranks(tmp_path, "placements", "pytorch_lightning", launch_both=True):
        assert result["norms"] == pytest.approx(result["expected"], rel=1e-6)


GUARD = Path(__file__).with_name("distributed_guard.py")


BRIEF_AND_THOROUGH = pytest.mark.parametrize("words", [(), pytest.param(("thorough",), marks=pytest.mark.slow)])


@BRIEF_AND_THOROUGH
def test_a_bad_batch_on_one_rank_is_skipped_by_both(tmp_path: Path, words: tuple[str, ...]) -> None:
    results = two_ranks(tmp_path, "ddp", "pytorch_lightning", *words, launch_both=True, script=GUARD)
    stops = [name for name in results[0] if name.startswith("stop")]
    for name in results[0].keys() - set(stops):
        assert [result[name] for result in results] == [[], []], name
    for name in stops:
        first, second = (result[name] for result in results)
        assert first["step"] == second["step"] == 5, name
        assert first["sum"] == second["sum"], name
        assert first["bad"] == second["bad"] == [], name
        assert "epoch 0, batch 4, global step 4, rank 1" in first["said"][0], name
        assert second["said"] == [], name


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("namespace", runs.NAMESPACES)
def test_on_two_gpus_both_ranks_leave_fp16_at_the_step_that_overflows_on_one(tmp_path: Path, namespace: str) -> None:
    """Bit-equal to a change by hand before the batch (with accumulation, before its window)."""
    results = two_ranks(tmp_path, "gpus", namespace, launch_both=True, script=GUARD)
    for name in results[0]:
        steps = 4 if name.endswith("accumulate=1") else 1
        for result in results:
            assert result[name]["differences"] == [], name
            assert result[name]["precision"] == "32-true", name
            assert result[name]["step"] == steps, name
        assert results[0][name]["sum"] == results[1][name]["sum"], name


@BRIEF_AND_THOROUGH
def test_a_bad_batch_on_one_rank_is_skipped_by_all_shards(tmp_path: Path, words: tuple[str, ...]) -> None:
    for result in two_ranks(tmp_path, "fsdp2", "lightning.pytorch", *words, launch_both=True, script=GUARD):
        for name, (ours, reference) in result.items():
            assert ours == reference, name


LAYERS = Path(__file__).with_name("distributed_layers.py")


@BRIEF_AND_THOROUGH
def test_two_ranks_with_the_layer_check_are_those_without_and_the_first_reports(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    results = two_ranks(tmp_path, "ddp", "pytorch_lightning", *words, launch_both=True, script=LAYERS)
    for name in results[0].keys() - {"report"}:
        assert [result[name] for result in results] == [[], []], name
    first, second = (result["report"] for result in results)
    assert second["said"] == []
    assert "the input of `net.1` has std" in first["said"][0]
    [event] = first["events"]
    assert (event["step"], event["rank"]) == (0, 0)
    assert event["far_from_unit_scale"][0]["cause"] == "net.0"


def test_an_input_flagged_on_one_rank_is_skipped_or_raised_by_both(tmp_path: Path) -> None:
    script = Path(__file__).with_name("distributed_inputs.py")
    first, second = two_ranks(tmp_path, "ddp", "pytorch_lightning", launch_both=True, script=script)
    for name in first:
        if name.startswith("skip"):
            assert first[name] == second[name] == [], name
    said, *where = first["raise"]
    assert where == [4, 4, 1, -1]
    assert "the batch of rank 1 was flagged" in said
    said, *where = second["raise"]
    assert where == [4, 4, 1, 2]
    assert (
        "epoch 0, batch 4, rank 1: `batch[0]` holds 6 values that are not finite; sample 2 (dataset index 37)" in said
    )
    assert first["raise for the first batch"][1:] == [0, 0, 1, -1]
    said, *where = second["raise for the first batch"]
    assert where == [0, 0, 1, 1]
    assert said.endswith("sample 1 (dataset index 3). Its loss is not finite either.")
    assert first["write"]["rows"] == [["0", "4", "1", "37"], ["1", "4", "1", "37"]]
    assert first["write"]["said"] == []
    assert "rank 1" in second["write"]["said"][0]
