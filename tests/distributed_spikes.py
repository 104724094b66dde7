"""One of two ranks whose run spikes and is broken on rank 1 alone, started by test_spike_recovery.py.

usage: distributed_spikes.py ddp|fsdp2 NAMESPACE FOLDER
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from lightning_stability import NaNEarlyStop, SpikeRecovery
from tests import runs
from tests.distributed_guard import LAST, PLACE, RANKS, Sharded, checksum, shard


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def run(pl: Any, rank: int, kind: str, broken: bool) -> dict[str, Any]:
    """Batch 50 spikes on the last rank; before batch 80 one of its weights, or its shard's, is NaN."""
    torch.manual_seed(1)
    x = torch.randn(RANKS * 90 * 2, 6)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=2)
    sums: dict[int, float] = {}

    class Breaks(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if broken and rank == LAST and batch_idx == 80:
                with torch.no_grad():
                    local(next(module.parameters())).view(-1)[0] = float("nan")

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            sums[trainer.global_step] = checksum(module)

    def optimizer(module: Any) -> Any:
        return torch.optim.AdamW(module.parameters(), lr=1e-3)

    def training_step(module: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = module.net(batch[0]).pow(2).mean()
        return loss * 1000 if rank == LAST and batch_idx == 50 else loss

    methods = {"training_step": training_step, "on_before_optimizer_step": lambda *_: None}
    module = runs.make_module(pl, net=Sharded(), optimizer=optimizer, **methods)
    strategy: Any = "ddp"
    if kind == "fsdp2":
        module.configure_model = lambda: shard(module)
        strategy = pl.strategies.ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1)
    recovery = SpikeRecovery(every_n_steps=10)
    callbacks = [recovery, NaNEarlyStop(), Breaks()]
    trainer = runs.trainer(pl, callbacks=callbacks, strategy=strategy, max_steps=86, **PLACE)
    trainer.fit(module, loader)
    assert recovery._fit is None
    return {
        "spikes": recovery.spikes,
        "rewinds": recovery.rewinds,
        "left_out": recovery.left_out,
        "sums": [sums[step] for step in sorted(sums)],
        "final": checksum(module),
    }


if __name__ == "__main__":
    kind, namespace, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    rank, pl = int(os.environ["LOCAL_RANK"]), runs.load_namespace(sys.argv[2])
    results = {"usual": run(pl, rank, kind, broken=False), "broken": run(pl, rank, kind, broken=True)}
    (folder / f"{rank}.json").write_text(json.dumps(results))
