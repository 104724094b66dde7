"""One rank of runs in which the last rank alone has a fault, started by torchrun from test_many_gpus.py.

usage: distributed_many.py ddp|fsdp2 cpu|gpu FOLDER SCENARIO...

Each scenario leaves SCENARIO-RANK.json. One that takes longer than its limit ends the process and shows where it was.
"""

import datetime
import faulthandler
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_stability import FractionalCheckpoint, IncidentReport, NaNEarlyStop, PrecisionFallback
from lightning_stability.runtime import exchange
from tests import distributed_guard as guard
from tests import distributed_spikes as spikes
from tests import runs
from tests.distributed_guard import FUSED, LAST, PLACE, RANKS, Sharded, checksum, fit_sharded
from tests.recovery import poison

LIMIT = 150
"""Seconds for one scenario."""
BAD = 4
"""The batch that is bad."""
SAMPLES = 96


# Faults of one rank: what differs from a run that leaves the step out by hand, and what all ranks have afterwards.


def skips(kind: str) -> Callable[[], dict[str, Any]]:
    def scenario() -> dict[str, Any]:
        ours, reference = (trained(kind, by_hand) for by_hand in (False, True))
        differences = poison.differences(ours.pop("all"), reference.pop("all"))
        return {**ours, "reference": reference, "differences": differences}

    return scenario


def trained(kind: str, by_hand: bool) -> dict[str, Any]:
    kinds = {BAD: kind} if rank == LAST else {BAD: "left_out"} if by_hand else {}
    net = None if strategy == "ddp" else Sharded
    late = kind == "late_gradient"
    if late:
        kinds = {BAD: "left_out"} if by_hand else {}
    module = poison.make_module(pl, kinds, FUSED[True], by_hand, net=net)
    if late and not by_hand:
        module.on_after_backward = lambda: spoil_gradient(module)
    return fit(module, [] if by_hand else [NaNEarlyStop(patience=10**6)])


def spoil_gradient(module: Any) -> None:
    """As a faulty device would: after the reduction, on one rank."""
    if rank == LAST and module.batch == BAD:
        gradient = next(module.parameters()).grad
        getattr(gradient, "to_local", lambda: gradient)().fill_(torch.nan)


def fit(module: Any, callbacks: list[Any]) -> dict[str, Any]:
    if strategy == "ddp":
        result = guard.fit(pl, module, callbacks)
        return {
            "step": result["step"],
            "sum": checksum(module),
            "bad": poison.nonfinite(result["weights"]),
            "all": result,
        }
    trainer = fit_sharded(pl, module, callbacks)
    return {"step": trainer.global_step, "sum": checksum(module), "bad": nonfinite(module), "all": None}


def nonfinite(module: Any) -> list[str]:
    return [name for name, p in module.named_parameters() if not bool(spikes.local(p).isfinite().all())]


def stops() -> dict[str, Any]:
    module = poison.make_module(pl, {BAD: "nan_loss"} if rank == LAST else {}, FUSED[True], False, net_of_strategy())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fit(module, [NaNEarlyStop(patience=0)])
    del result["all"]
    return {**result, "said": [str(w.message) for w in caught if "NaNEarlyStop" in str(w.message)]}


def falls_back() -> dict[str, Any]:
    """Batch 4 of the last rank alone overflows in fp16: beside a change by hand; refused where it cannot be made."""
    if strategy == "fsdp2":
        try:
            module = poison.make_module(pl, {}, FUSED[True], False, Sharded)
            fit_sharded(pl, module, [PrecisionFallback()], precision="bf16-mixed")  # Lightning refuses 16-mixed there
        except Exception as error:
            return {"refused": f"{type(error).__name__}: {error}"}
        return {"refused": None}
    differences = guard.fall_back(pl, rank)
    module = poison.make_module(pl, {BAD: "large_input"} if rank == LAST else {}, FUSED[True], by_hand=False)
    callback = PrecisionFallback()
    result = guard.fit(pl, module, [callback], 256.0)
    return {
        "differences": differences,
        "precision": str(result["trainer"].precision),
        "changed_at": callback.state_dict().get("step"),
        "step": result["step"],
        "sum": checksum(module),
        "bad": poison.nonfinite(result["weights"]),
    }


def recovers() -> dict[str, Any]:
    return {f"{broken=}": spikes.run(pl, rank, strategy, broken) for broken in (False, True)}


def reports() -> dict[str, Any]:
    """An incident is written, and the run continues as one without the report."""
    results = []
    for more in ([IncidentReport(folder / strategy)], []):
        module = poison.make_module(pl, {BAD: "nan_gradient"} if rank == LAST else {}, adamw, False, net_of_strategy())
        results.append(fit(module, [*more, NaNEarlyStop(patience=2)]))
    ours, reference = results
    return {"differences": poison.differences(ours.pop("all"), reference.pop("all")), **ours, "reference": reference}


def adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-2)


def net_of_strategy() -> Any:
    return None if strategy == "ddp" else Sharded


# Ends of one rank.


def late_gradient() -> dict[str, Any]:
    """Under DDP no other rank can see it: the last rank ends, and with it the run."""
    exchange.TIMEOUT = datetime.timedelta(seconds=3)
    module = poison.make_module(pl, {}, FUSED[True], by_hand=False)
    module.on_after_backward = lambda: spoil_gradient(module)
    try:
        guard.fit(pl, module, [NaNEarlyStop()])
    except exchange.RanksDisagreeError as error:
        leave("said", {"said": str(error), "bad": poison.nonfinite(module.state_dict())})
        raise
    return {}


def raises() -> dict[str, Any]:
    """Without any callback of ours, the last rank alone raises an exception."""
    module = poison.make_module(pl, {}, FUSED[True], by_hand=False)

    def stumble() -> None:
        if rank == LAST and module.batch == BAD:
            raise ValueError("a fault of one rank")

    module.on_after_backward = stumble
    guard.fit(pl, module, [])
    return {}


def train(kill_at: int | None = None, ckpt_path: str | None = None) -> dict[str, Any]:
    """With checkpoints, until one rank is killed; or from a checkpoint to the end."""
    torch.manual_seed(3)
    data = torch.utils.data.TensorDataset(torch.randn(SAMPLES, 6))
    module = runs.make_module(pl, Sharded(), lambda m: adamw(m.parameters()), on_before_optimizer_step=lambda *_: None)
    options: dict[str, Any] = {"strategy": "ddp"}
    if strategy == "fsdp2":
        module.configure_model = lambda: guard.shard(module)
        options["strategy"] = pl.strategies.ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1)

    class Kill(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if rank == LAST and trainer.global_step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    saver = FractionalCheckpoint(0.25, dirpath=folder / "checkpoints", save_top_k=-1, save_last=None)
    callbacks = [saver, NaNEarlyStop(patience=2), Kill()]
    trainer = runs.trainer(pl, callbacks=callbacks, max_epochs=2, enable_checkpointing=True, **options, **PLACE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, StatefulDataLoader(data, batch_size=4, shuffle=True), ckpt_path=ckpt_path)
    said = [str(w.message) for w in caught if "processes" in str(w.message)]
    return {"step": trainer.global_step, "sum": checksum(module), "bad": nonfinite(module), "said": said}


SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {
    "batch": skips("nan_input"),
    "loss": skips("inf_loss"),
    "gradient": skips("nan_gradient"),
    "reduced_gradient": skips("late_gradient"),
    "overflow": falls_back,
    "stop": stops,
    "spikes": recovers,
    "incident": reports,
    "late_gradient": late_gradient,
    "raises": raises,
    "undisturbed": train,
    "killed": lambda: train(kill_at=int(1.7 * SAMPLES / RANKS / 4)),
    "resumed": lambda: train(ckpt_path=os.environ["CKPT_PATH"]),
}


def leave(name: str, result: dict[str, Any]) -> None:
    (folder / f"{name}-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    strategy, accelerator, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    rank, pl = int(os.environ["LOCAL_RANK"]), runs.load_namespace("pytorch_lightning")
    PLACE["accelerator"] = accelerator
    if accelerator == "gpu":
        torch.cuda.set_device(rank)
    for name in sys.argv[4:]:
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        leave(name, SCENARIOS[name]())
        faulthandler.cancel_dump_traceback_later()
