"""A run whose weights go wrong, without and with a kill between the first spike and the rewind.

usage: spike_kills.py FOLDER KILL_AFTER_BATCH ACCUMULATE
Each fit is a process of its own, forked off this one, which has imported everything. Writes `whole.pt`, `resumed.pt`.
"""

import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_stability import FractionalCheckpoint, SpikeRecovery
from tests import runs

BATCHES, BROKEN = 140, 100


def fit(folder: Path, name: str, accumulate: int, kill_after: int | None = None, resume: bool = False) -> None:
    pl = runs.load_namespace("pytorch_lightning")
    torch.set_num_threads(1)
    torch.manual_seed(0)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self.net(batch[0]) - batch[0][:, :3]).pow(2).mean()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1 == BROKEN * accumulate:
                with torch.no_grad():
                    self.net[3].weight.mul_(64.0)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    class Kill(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1 == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)

    recovery = SpikeRecovery(every_n_steps=10)
    saves = FractionalCheckpoint(every_n_epochs=2 / BATCHES, dirpath=folder / f"{name}-checkpoints")
    trainer = runs.trainer(
        pl,
        callbacks=[recovery, saves, *([] if kill_after is None else [Kill()])],
        enable_checkpointing=True,
        accumulate_grad_batches=accumulate,
        max_epochs=2,
    )
    x = torch.randn(BATCHES * accumulate * 2, 6, generator=torch.Generator().manual_seed(5))
    loader = StatefulDataLoader(TensorDataset(x), batch_size=2, shuffle=True)
    module = Module()
    newest = folder / "killed-checkpoints" / "last.ckpt"
    trainer.fit(module, loader, ckpt_path=newest if resume else None)
    counts = (recovery.spikes, recovery.rewinds, recovery.left_out, recovery._position, trainer.global_step)
    optimizer = trainer.optimizers[0].state_dict()
    torch.save(
        {"module": module.state_dict(), "optimizer": optimizer, "counts": counts, "random": torch.rand(3)},
        folder / f"{name}.pt",
    )


def in_process(**options: Any) -> int:
    """Fit in a process of its own; its exit status."""
    child = os.fork()
    if child == 0:
        try:
            warnings.simplefilter("ignore")
            fit(**options)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    folder, kill_after, accumulate = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    assert in_process(folder=folder, name="whole", accumulate=accumulate) == 0
    killed = in_process(folder=folder, name="killed", accumulate=accumulate, kill_after=kill_after)
    assert killed == -signal.SIGKILL, killed
    assert in_process(folder=folder, name="resumed", accumulate=accumulate, resume=True) == 0
