"""One of two ranks that train with InputCheck; a sample which only rank 1 gets is bad (see test_distributed.py).

usage: distributed_inputs.py ddp NAMESPACE FOLDER
"""

import csv
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_stability import InputCheck, InputError
from lightning_stability.flagged_inputs import FILE_NAME
from tests import runs
from tests.recovery import poison

BAD_BATCH = 4  # of 6 in each of two epochs


def data(how: float, bad: int = 37) -> Any:
    torch.manual_seed(1)
    x = torch.randn(48, 6)
    x[bad] *= how
    dataset, rank = TensorDataset(x), int(os.environ["LOCAL_RANK"])
    return DataLoader(dataset, batch_size=4, sampler=DistributedSampler(dataset, 2, rank, shuffle=False))


def fit(
    pl: Any, how: float, callbacks: list[Any], by_hand: bool, fused: bool = False, bad: int = 37, **options: Any
) -> Any:
    kinds = dict.fromkeys((BAD_BATCH, BAD_BATCH + 6), "rejected") if by_hand else {}
    module = poison.make_module(pl, kinds, lambda p: torch.optim.AdamW(p, lr=1e-2, fused=fused), by_hand)
    torch.manual_seed(3 + int(os.environ["LOCAL_RANK"]))
    return poison.fit(pl, module, callbacks, data(how, bad), devices=2, strategy="ddp", **options)


def skip(pl: Any, how: float, fused: bool, scale: float | None = None) -> list[str]:
    """What differs from a run in which both ranks leave the step out by hand."""
    results = []
    for by_hand in (False, True):
        plugins = None if scale is None else runs.fp16(pl, init_scale=scale)
        callbacks = [] if by_hand else [InputCheck(action="skip")]
        results.append(fit(pl, how, callbacks, by_hand, fused, plugins=plugins))
    return poison.differences(*results) + poison.nonfinite(results[0]["weights"])


def stop(pl: Any, bad: int) -> list[Any]:
    try:
        fit(pl, torch.nan, [InputCheck(action="raise")], by_hand=False, bad=bad)
    except InputError as error:
        return [str(error), error.step, error.batch_idx, error.rank, error.sample]
    return []


def write(pl: Any, folder: Path) -> dict[str, Any]:
    logger = pl.loggers.CSVLogger(folder, name="logs", version=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(pl, 1e5, [InputCheck(action="skip")], by_hand=False, logger=logger)
    torch.distributed.barrier()
    said = [str(w.message) for w in caught if str(w.message).startswith("InputCheck")]
    with (Path(logger.log_dir) / FILE_NAME).open(newline="") as file:
        rows = [(row["epoch"], row["batch_idx"], row["rank"], row["dataset_index"]) for row in csv.DictReader(file)]
    return {"said": said, "rows": rows}


if __name__ == "__main__":
    namespace, folder = sys.argv[2], Path(sys.argv[3])
    pl, rank = runs.load_namespace(namespace), int(os.environ["LOCAL_RANK"])
    results = {
        "skip nan": skip(pl, torch.nan, fused=False),
        "skip too large, fused": skip(pl, 1e5, fused=True),
        "skip nan, fp16": skip(pl, torch.nan, fused=False, scale=256.0),
        "raise": stop(pl, bad=37),
        "raise for the first batch": stop(pl, bad=3),
        "write": write(pl, folder),
    }
    (folder / f"{rank}.json").write_text(json.dumps(results))
