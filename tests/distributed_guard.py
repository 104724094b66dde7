"""One of two ranks that train with bad batches on rank 1 alone, started by test_distributed.py.

usage: distributed_guard.py ddp|fsdp2|gpus NAMESPACE FOLDER [thorough]
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard

from lightning_stability import NaNEarlyStop, PrecisionFallback
from tests import runs
from tests.recovery import poison

FUSED = {False: lambda p: torch.optim.AdamW(p, lr=1e-2), True: lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True)}

RANKS = int(os.environ.get("WORLD_SIZE", "2"))
LAST = RANKS - 1
"""The rank that has the bad batches."""
PLACE: dict[str, Any] = {"accelerator": "cpu", "devices": RANKS}
DEVICES = {"cpu": "cpu", "gpu": "cuda"}

THOROUGH = "thorough" in sys.argv
KINDS = [("inf_loss", False), ("nan_gradient", True)]
if THOROUGH:
    KINDS = [(kind, fused) for kind in ("nan_input", "inf_loss", "nan_gradient") for fused in (False, True)]


def ddp(pl: Any, rank: int) -> dict[str, Any]:
    results = {}
    for kind, fused in KINDS:
        results[f"{kind} fused={fused}"] = compare(pl, rank, kind, fused)
    # Scale 2^24 makes ordinary overflows besides, which only GradScaler answers.
    for scale in (2.0**24, 256.0)[: 2 if THOROUGH else 1]:
        results[f"nan_input scale={scale}"] = compare(pl, rank, "nan_input", False, scale)
    for fused in (False, True):
        results[f"stop fused={fused}"] = stop(pl, rank, fused)
        results[f"stop fp16 fused={fused}"] = stop(pl, rank, fused, 256.0)
    results["fallback"] = fall_back(pl, rank)
    results["fallback in place"] = fall_back_from_a_batch_changed_in_place(pl, rank)
    return results


def fall_back(pl: Any, rank: int) -> list[str]:
    """Batch 4 of the last rank alone overflows in fp16: both ranks change, and train it again."""
    results = []
    for by_hand in (False, True):
        module = poison.make_module(pl, {4: "large_input"} if rank == LAST else {}, FUSED[False], by_hand=False)
        callback = change_by_hand(pl) if by_hand else PrecisionFallback()
        results.append(fit(pl, module, [callback], 256.0))
    precision = str(results[0]["trainer"].precision)
    return poison.differences(*results) + ([] if precision == "32-true" else [precision])


def fall_back_from_a_batch_changed_in_place(pl: Any, rank: int) -> list[str]:
    """The last rank alone has changed the batch that overflows, so neither trains it again."""
    module = poison.make_module(pl, {}, FUSED[False], by_hand=False)
    original = module.training_step

    def training_step(batch: Any, batch_idx: int) -> torch.Tensor:
        if rank == LAST and batch_idx == 4:
            batch[0].mul_(1e6)
        return original(batch, batch_idx)

    module.training_step = training_step
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fit(pl, module, [PrecisionFallback()], 256.0)
    said = [str(w.message) for w in caught if "this batch is not trained again" in str(w.message)]
    precision = str(result["trainer"].precision)
    return [*([] if precision == "32-true" else [precision]), *([] if len(said) == (rank == 0) else said or ["silent"])]


def gpus(pl: Any, rank: int) -> dict[str, Any]:
    """The same on two GPUs: what differs from a change by hand, and where the change came."""
    results: dict[str, Any] = {}
    for fused in (False, True):
        for accumulate in (1, 4):
            runs_of_both = []
            for by_hand in (False, True):
                kinds = {4: "large_input"} if rank == LAST else {}
                module = poison.make_module(pl, kinds, FUSED[fused], by_hand=False)
                callback = change_by_hand(pl) if by_hand else PrecisionFallback()
                scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
                plugin = pl.plugins.precision.MixedPrecision("16-mixed", "cuda", scaler)
                torch.manual_seed(3 + rank)
                torch.cuda.manual_seed(3 + rank)
                options = {"accelerator": "gpu", "devices": 2, "strategy": "ddp", "plugins": [plugin]}
                options["accumulate_grad_batches"] = accumulate
                result = poison.fit(pl, module, [callback], poison.data(16), **options)
                if accumulate > 1:  # what a callback did in the window, it did with the first try's buffers
                    del result["average"]
                change = None if by_hand else callback.state_dict()
                runs_of_both.append({**result, "cuda random": torch.cuda.get_rng_state(), "change": change})
            change = runs_of_both[0].pop("change") or {}
            runs_of_both[1].pop("change")
            results[f"fused={fused} accumulate={accumulate}"] = {
                "differences": poison.differences(*runs_of_both) + poison.nonfinite(runs_of_both[0]["weights"]),
                "precision": str(runs_of_both[0]["trainer"].precision),
                "step": change.get("step"),
                "sum": checksum(module),
            }
    return results


def change_by_hand(pl: Any) -> Any:
    class Change(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            if module.batch + 1 == 4:
                trainer.strategy.precision_plugin = pl.plugins.precision.Precision()

    return Change()


def compare(pl: Any, rank: int, kind: str, fused: bool, scale: float | None = None) -> list[str]:
    """Batches 1 and 4 of the last rank are bad: what differs from a run in which both ranks leave these steps out."""
    results = []
    for by_hand in (False, True):
        kinds = {1: kind, 4: kind} if rank == LAST else {1: "left_out", 4: "left_out"} if by_hand else {}
        module = poison.make_module(pl, kinds, FUSED[fused], by_hand)
        callbacks = [] if by_hand else [NaNEarlyStop(patience=10**6)]
        results.append(fit(pl, module, callbacks, scale))
    return poison.differences(*results) + poison.nonfinite(results[0]["weights"])


def stop(pl: Any, rank: int, fused: bool, scale: float | None = None) -> dict[str, Any]:
    module = poison.make_module(pl, {4: "nan_loss"} if rank == LAST else {}, FUSED[fused], by_hand=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fit(pl, module, [NaNEarlyStop(patience=0)], scale)
    said = [str(w.message) for w in caught if "NaNEarlyStop" in str(w.message)]
    return {"step": result["step"], "said": said, "bad": poison.nonfinite(result["weights"]), "sum": checksum(module)}


def fit(pl: Any, module: Any, callbacks: list[Any], scale: float | None = None) -> dict[str, Any]:
    plugins = None if scale is None else runs.fp16(pl, DEVICES[PLACE["accelerator"]], init_scale=scale)
    torch.manual_seed(3 + int(os.environ["LOCAL_RANK"]))
    return poison.fit(pl, module, callbacks, poison.data(6 * RANKS), strategy="ddp", plugins=plugins, **PLACE)


def checksum(module: Any) -> float:
    """Of what all ranks have in common: a layer that renormalises its weights does it for its own batch's rows."""
    common = [p for name, p in module.net.named_parameters() if "words" not in name]
    return float(sum(getattr(p, "full_tensor", lambda p=p: p)().detach().double().sum() for p in common))


def fsdp2(pl: Any, rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for kind, fused in KINDS:
        sums = []
        for by_hand in (False, True):
            kinds = {1: kind} if rank == LAST else {1: "left_out"} if by_hand else {}
            module = poison.make_module(pl, kinds, FUSED[fused], by_hand, net=Sharded)
            trainer = fit_sharded(pl, module, [] if by_hand else [NaNEarlyStop(patience=1)])
            sums.append([checksum(module), trainer.global_step])
        results[f"{kind} fused={fused}"] = sums
    return results


def fit_sharded(pl: Any, module: Any, callbacks: list[Any], **options: Any) -> Any:
    module.configure_model = lambda: shard(module)
    strategy = pl.strategies.ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1)
    torch.manual_seed(3)
    trainer = runs.trainer(pl, callbacks=callbacks, strategy=strategy, **PLACE, **options)
    trainer.fit(module, poison.data(6 * RANKS))
    return trainer


class Sharded(torch.nn.Module):
    """Two parts, each sharded by itself; no buffers that ranks would not agree on."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(6, 8)
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.encoder(x)))[:, 0]


def shard(module: Any) -> None:
    mesh = module.device_mesh["data_parallel"]
    fully_shard(module.net.encoder, mesh=mesh)
    fully_shard(module.net, mesh=mesh)


if __name__ == "__main__":
    kind, namespace, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    rank = int(os.environ["LOCAL_RANK"])
    results = {"ddp": ddp, "fsdp2": fsdp2, "gpus": gpus}[kind](runs.load_namespace(namespace), rank)
    (folder / f"{rank}.json").write_text(json.dumps(results))
