"""One of two ranks that train with and without InputCheck's layer scale check, started by test_distributed.py.

usage: distributed_layers.py ddp NAMESPACE FOLDER [thorough]
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from lightning_stability import InputCheck, NaNEarlyStop
from lightning_stability.events import read_events
from tests import busy_module, runs


def compare(pl: Any, **options: Any) -> list[str]:
    """What differs between a run with the check and one without."""
    results = []
    for check in ([], [InputCheck()]):
        module = busy_module.make_module(pl)
        chosen = {**options, "plugins": runs.fp16(pl)} if options.get("plugins") else options
        results.append(
            busy_module.fit(pl, module, [*check, NaNEarlyStop(patience=0)], devices=2, strategy="ddp", **chosen)
        )
    return busy_module.differences(*results)


def report(pl: Any, folder: Path, rank: int) -> dict[str, Any]:
    """Inputs that are far from unit scale, on both ranks."""
    logger = pl.loggers.CSVLogger(str(folder), name="", version="log")
    module = busy_module.make_module(pl)
    nn.init.constant_(module.net[0].weight, 1e4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        busy_module.fit(pl, module, [InputCheck()], logger=logger, devices=2, strategy="ddp", max_epochs=1)
    said = [str(w.message) for w in caught if "InputCheck: the" in str(w.message)]
    events = [e for e in read_events(folder / "log") if e["event"] == "input_scales"] if rank == 0 else []
    return {"said": said, "events": events}


if __name__ == "__main__":
    pl, folder, rank = runs.load_namespace(sys.argv[2]), Path(sys.argv[3]), int(os.environ["LOCAL_RANK"])
    results: dict[str, Any] = {"fp16": compare(pl, plugins=True, accumulate_grad_batches=2)}
    if "thorough" in sys.argv:
        results["fp32"] = compare(pl)
        results["16-true"] = compare(pl, precision="16-true")
    results["report"] = report(pl, folder, rank)
    (folder / f"{rank}.json").write_text(json.dumps(results))
