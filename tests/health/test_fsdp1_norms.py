"""The norms under FSDP1: two real ranks on the CPU, where gloo carries it; Lightning's own strategy wants a GPU."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_stability import GradNormMonitor, NaNEarlyStop
from tests import runs
from tests.command import launcher

pytestmark = pytest.mark.xdist_group("fsdp1")  # one worker, so that the ranks start once
SCRIPT = Path(__file__).with_name("fsdp1_norms.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fsdp1")
    for done in launcher().ranks(str(SCRIPT), str(folder), cwd=folder, env={"OMP_NUM_THREADS": "1"}):
        assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")


@pytest.mark.parametrize("parameters", ["original", "flat"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_rank_has_the_norm_of_the_whole_gradient(
    ranks: list[dict[str, Any]], strategy: str, parameters: str
) -> None:
    expected = math.hypot(*ranks[0]["reference"].values())
    ours = [rank[f"{strategy} {parameters}"] for rank in ranks]
    assert [rank["total"] for rank in ours] == pytest.approx([expected] * 2, rel=1e-5)
    assert ours[0]["norms"] == ours[1]["norms"]
    assert ours[0]["updates"] == ours[1]["updates"] > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_use_orig_params_gives_the_norms_of_layers(ranks: list[dict[str, Any]], strategy: str) -> None:
    result = ranks[1][f"{strategy} original"]
    norms = {name.replace("_fsdp_wrapped_module.", ""): norm for name, norm in result["norms"].items()}
    assert norms == pytest.approx(ranks[1]["reference"], rel=1e-5)
    assert result["groups"] == ["0", "2", "4"]


@pytest.mark.parametrize("parameters", ["original", "flat"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bad_gradient_of_one_rank_is_bad_on_both(ranks: list[dict[str, Any]], strategy: str, parameters: str) -> None:
    totals = [rank[f"{strategy} {parameters}, NaN on rank 1"]["total"] for rank in ranks]
    assert all(math.isnan(total) for total in totals)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_trainer_with_strategy_fsdp(pl: Any, precision: str) -> None:
    logger = runs.memory_logger(pl)
    callbacks = [GradNormMonitor(), NaNEarlyStop(patience=2)]
    options = {"accelerator": "gpu", "strategy": "fsdp", "precision": precision, "logger": logger}
    trainer = runs.trainer(pl, callbacks=callbacks, **options)
    nothing = {"on_before_optimizer_step": lambda self, optimizer: None}
    trainer.fit(runs.make_module(pl, **nothing), runs.data())
    assert trainer.global_step == 4
    rows = [row for _, row in logger.rows if "grad_norm/total" in row]
    assert all(row["grad_norm/total"] > 0 for row in rows)
    assert rows or precision == "16-mixed"
    if rows:
        assert {"grad_norm/net.encoder", "grad_norm/net.head"} <= set(rows[0])
    torch.distributed.destroy_process_group()
