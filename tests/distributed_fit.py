"""One rank of a two-rank fit on gloo, started by test_distributed.py or by Lightning.

usage: distributed_fit.py KIND NAMESPACE FOLDER
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_stability import GradNormMonitor
from tests import runs


def fit_ddp(pl: Any, folder: Path, clip: float | None) -> None:
    class RankData(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.randn(6, generator=torch.Generator().manual_seed(index))

    module = runs.make_module(pl, training_step=lambda self, batch, batch_idx: self.net(batch).pow(2).mean())
    finish(pl, module, torch.utils.data.DataLoader(RankData(), batch_size=2), folder, strategy="ddp", clip=clip)


def fit_fsdp2(pl: Any, folder: Path, clip: float | None) -> None:
    from torch.distributed.fsdp import fully_shard

    class Uneven(nn.Module):
        """Rows that two ranks cannot share evenly, and a bias of which one rank holds nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(6, 7)
            self.head = nn.Linear(7, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.encoder(x)))

    def configure_model(self: Any) -> None:
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net.encoder, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def on_before_optimizer_step(self: Any, optimizer: Any) -> None:
        grads = {name: p.grad.full_tensor().double() for name, p in self.named_parameters()}
        self.copies.append(grads)

    module = runs.make_module(
        pl, Uneven(), configure_model=configure_model, on_before_optimizer_step=on_before_optimizer_step
    )
    strategy = pl.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    finish(pl, module, runs.data(16), folder, strategy=strategy, clip=clip)


def finish(pl: Any, module: Any, loader: Any, folder: Path, strategy: Any, clip: float | None) -> None:
    clipped = []

    def optimizer_step(epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        optimizer.step(closure=closure)
        grads = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)().double() for p in module.parameters()]
        clipped.append(float(torch.stack([g.norm() for g in grads]).norm()))

    module.optimizer_step = optimizer_step
    logger, recorder = runs.memory_logger(pl), runs.RecordCallback()
    trainer = runs.trainer(
        pl,
        devices=2,
        strategy=strategy,
        logger=logger,
        callbacks=[GradNormMonitor(log_update_ratio=True), recorder],
        gradient_clip_val=clip,
    )
    trainer.fit(module, loader)
    result = {
        "rows": [row for _, row in logger.rows],
        "totals": [record.total_norm for record in recorder.records],
        "references": [runs.reference_norms(copies, 2) for copies in module.copies],
        "clipped": clipped,
    }
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(result))


def measure_placements(folder: Path) -> None:
    """Gradients that are sharded, replicated and still to be summed, on one mesh, without a Trainer."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    from lightning_stability.health import GradientMeter, LateReads

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    whole = [torch.randn(5, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    parameters = []
    for gradient, placement in zip(whole, (Shard(0), Replicate(), Partial()), strict=True):
        stored = Replicate() if placement.is_partial() else placement
        parameter = nn.Parameter(distribute_tensor(torch.zeros(5, 3), mesh, [stored]))
        if placement.is_partial():
            halves = gradient * (0.25 if rank == 0 else 0.75)
            parameter.grad = DTensor.from_local(halves, mesh, [placement])
        else:
            parameter.grad = distribute_tensor(gradient, mesh, [placement])
        parameters.append(parameter)
    plain = nn.Parameter(torch.zeros(2))
    plain.grad = torch.tensor([3.0, 4.0])
    meter = GradientMeter(torch.optim.SGD([plain, *parameters], lr=0.1), {}, drives_clipping=False)
    meter.measure({})
    results: list[list[float]] = []
    reads = LateReads()
    meter.send(reads, lambda measurement: results.append(measurement.grad_norms.tolist()))
    reads.drain()
    expected = [5.0] + [float(gradient.double().norm()) for gradient in whole]
    (folder / f"{rank}.json").write_text(json.dumps({"norms": results[0], "expected": expected}))
    dist.destroy_process_group()


if __name__ == "__main__":
    kind, namespace, where = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    torch.manual_seed(0)
    if kind == "placements":
        measure_placements(where)
    else:
        which, _, clipping = kind.partition("-")
        launch = {"ddp": fit_ddp, "fsdp2": fit_fsdp2}[which]
        launch(runs.load_namespace(namespace), where, 0.05 if clipping else None)
