"""One of two ranks whose gradients are not the same: the run ends on both (see test_disagreement.py).

usage: distributed_disagree.py plain|late|uneven NAMESPACE FOLDER
"""

import datetime
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_stability import GradNormMonitor, IncidentReport, InputCheck, NaNEarlyStop, SpikeRecovery
from lightning_stability.runtime import exchange
from tests import runs

BAD_BATCH = 2


def plain_backward(self: Any, batch: Any, batch_idx: int) -> None:
    """`loss.backward()` in manual optimization: Lightning's DDP does not reduce what it makes."""
    loss = self.net(batch[0] * torch.nan if rank == 1 and batch_idx == BAD_BATCH else batch[0]).pow(2).mean()
    optimizer = self.optimizers()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def spoil_after_the_reduction(self: Any) -> None:
    """As a faulty device would: the gradients of rank 1 alone."""
    if rank == 1 and self.trainer.fit_loop.epoch_loop.batch_progress.current.ready == BAD_BATCH + 1:
        next(self.parameters()).grad.fill_(torch.nan)


if __name__ == "__main__":
    kind, namespace, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    pl, rank = runs.load_namespace(namespace), int(os.environ["LOCAL_RANK"])
    if kind == "late":  # the other rank will not answer
        exchange.TIMEOUT = datetime.timedelta(seconds=3)
    methods: dict[str, Any] = {"training_step": plain_backward} if kind == "plain" else {}
    if kind == "late":
        methods["on_after_backward"] = spoil_after_the_reduction
    module = runs.make_module(pl, **methods)
    module.automatic_optimization = kind != "plain"
    callbacks: list[Any] = [NaNEarlyStop()]
    rows, options = 24, {}
    if kind == "uneven":  # each rank has data of its own, and the second has more of them
        callbacks += [GradNormMonitor(), InputCheck(), SpikeRecovery(), IncidentReport(folder / "incidents")]
        rows, options = 24 + 8 * rank, {"use_distributed_sampler": False}
    trainer = runs.trainer(pl, callbacks=callbacks, devices=2, strategy="ddp", max_epochs=2, **options)
    raised: BaseException | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer.fit(module, runs.data(rows))
        except BaseException as error:
            raised = error
    finite = all(bool(parameter.isfinite().all()) for parameter in module.parameters())
    outcome = {"raised": type(raised).__name__, "said": str(raised), "step": trainer.global_step, "finite": finite}
    (folder / f"{rank}.json").write_text(json.dumps(outcome))
    os._exit(0)  # the other rank may never come to what ends a process group
