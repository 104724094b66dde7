"""One of two ranks, of which rank 1 alone has bad batches, started by tests/callbacks/test_incident_report_ranks.py.

usage: distributed_incident.py ddp|fsdp2 NAMESPACE FOLDER
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_stability import IncidentReport, NaNEarlyStop
from tests import runs
from tests.distributed_guard import Sharded, shard
from tests.recovery import poison

KINDS = {2: "nan_input", 5: "nan_gradient"}


def adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-2)


def fit(pl: Any, rank: int, callbacks: list[Any], kinds: dict[int, str]) -> dict[str, Any]:
    module = poison.make_module(pl, kinds if rank == 1 else {}, adamw, by_hand=False)
    torch.manual_seed(3 + rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = poison.fit(pl, module, callbacks, poison.data(12), devices=2, strategy="ddp", max_epochs=1)
    return {**result, "said": [str(w.message) for w in caught if "ended the run" in str(w.message)]}


def fit_sharded(pl: Any, rank: int, folder: Path) -> dict[str, Any]:
    module = poison.make_module(pl, KINDS if rank == 1 else {}, adamw, by_hand=False, net=Sharded)
    module.configure_model = lambda: shard(module)
    strategy = pl.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    callbacks = [IncidentReport(folder), NaNEarlyStop(patience=2)]
    trainer = runs.trainer(pl, callbacks=callbacks, max_epochs=1, devices=2, strategy=strategy)
    trainer.fit(module, poison.data(12))
    return {"step": trainer.global_step}


if __name__ == "__main__":
    kind, namespace, folder, rank = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(os.environ["LOCAL_RANK"])
    pl = runs.load_namespace(namespace)
    if kind == "fsdp2":
        (folder / f"{rank}.json").write_text(json.dumps(fit_sharded(pl, rank, folder)))
        sys.exit()
    with_report = fit(pl, rank, [IncidentReport(folder), NaNEarlyStop(patience=2)], KINDS)
    without = fit(pl, rank, [NaNEarlyStop(patience=2)], KINDS)
    stopped = fit(pl, rank, [NaNEarlyStop(patience=0)], {5: "nan_gradient"})
    results = {"differences": poison.differences(with_report, without), "said": stopped["said"]}
    (folder / f"{rank}.json").write_text(json.dumps(results))
