"""What PrecisionFallback costs while nothing happens, and what the one retried step costs.

The time of a fp16 step with the callback over that of a bare Trainer's, from interleaved blocks in one process (see
grad_norm.py), for fused and foreach AdamW. Then a fit in which one batch overflows fp16: the time of that step, of the
fp16 steps before it and of the fp32 steps after it.

usage: python benchmarks/fallback.py [--quick] [--rounds N] [--device cuda] [--workloads a,b] [--json FILE]
On a CPU, where fp16 is slow, only the small workload is worth its time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

import grad_norm  # noqa: E402
from common import quiet, save, spread  # noqa: E402

from lightning_stability import NaNEarlyStop, PrecisionFallback  # noqa: E402

BAD_STEP = 20


def main() -> None:
    options = arguments()
    quiet()
    device = torch.device(options.device)
    report: dict[str, Any] = {"machine": grad_norm.described(device), "rounds": options.rounds, "workloads": {}}
    print(json.dumps(report["machine"]), flush=True)
    for name in options.workloads:
        for fused in (True, False):
            workload = make_workload(name, device, options.quick, fused)
            kind = f"{name}, {'fused' if fused else 'foreach'} AdamW"
            result = {**steady(workload, device, options.rounds), "retried_step_ms": retried(workload, device)}
            report["workloads"][kind] = result
            print(f"\n{kind}: {result['bare_ms']['median']:.1f} ms bare", flush=True)
            for way, ratio in result["ratio"].items():
                print(f"  {way:32s} {ratio['median']:.3f} ({ratio['min']:.2f} to {ratio['max']:.2f})", flush=True)
            print("  " + ", ".join(f"{k} {v:.1f} ms" for k, v in result["retried_step_ms"].items()), flush=True)
            save(report, options.json)


def make_workload(name: str, device: torch.device, quick: bool, fused: bool) -> grad_norm.Workload:
    workload = grad_norm.make_workload(name, device, quick)
    assert workload is not None
    module = workload.module

    def configure_optimizers() -> torch.optim.Optimizer:
        trained = [p for p in module.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-5, fused=fused, foreach=None if fused else True)

    module.configure_optimizers = configure_optimizers  # type: ignore[method-assign]
    return workload


WAYS: dict[str, Any] = {
    "PrecisionFallback": lambda: [PrecisionFallback()],
    "PrecisionFallback + NaNEarlyStop": lambda: [PrecisionFallback(), NaNEarlyStop()],
}


def steady(workload: grad_norm.Workload, device: torch.device, rounds: int) -> dict[str, Any]:
    def block(callbacks: list[pl.Callback]) -> float:
        clock = grad_norm.Clock(device)
        trainer = make_trainer(device, [*callbacks, clock], grad_norm.Clock.WARM_UP + workload.steps)
        trainer.fit(workload.module, DataLoader(grad_norm.SameBatch(workload.batch), batch_size=None))
        return float(clock.seconds / workload.steps)

    block([])
    ratios: dict[str, list[float]] = {way: [] for way in WAYS}
    bare = [block([])]
    for _ in range(rounds):
        for way, callbacks in WAYS.items():
            seconds = block(callbacks())
            bare.append(block([]))
            ratios[way].append(2 * seconds / (bare[-2] + bare[-1]))
    return {
        "bare_ms": {key: 1e3 * value for key, value in spread(bare).items()},
        "ratio": {way: spread(values) for way, values in ratios.items()},
    }


class OneOverflows(Dataset[Any]):
    """The same batch over and over, but for one that asks for an overflow."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 2 * BAD_STEP

    def __getitem__(self, index: int) -> Any:
        return self.batch, index == BAD_STEP


class TimeSteps(pl.Callback):
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        grad_norm.synchronise(self.device)
        self.start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        grad_norm.synchronise(self.device)
        self.times.append(1e3 * (time.perf_counter() - self.start))


def retried(workload: grad_norm.Workload, device: torch.device) -> dict[str, float]:
    module = workload.module
    original = module.training_step

    def training_step(batch: Any, batch_idx: int) -> Any:
        data, overflows = batch
        loss = original(data, batch_idx)
        in_fp16 = torch.is_autocast_enabled(device.type)
        return loss * float("inf") if overflows and in_fp16 else loss

    module.training_step = training_step  # type: ignore[method-assign]
    clock = TimeSteps(device)
    trainer = make_trainer(device, [PrecisionFallback(), clock], 2 * BAD_STEP)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(OneOverflows(workload.batch), batch_size=None))
    del module.training_step
    assert trainer.precision == "32-true", "nothing was retried"
    return {
        "fp16 step": statistics.median(clock.times[5:BAD_STEP]),
        "retried step": clock.times[BAD_STEP],
        "fp32 step": statistics.median(clock.times[BAD_STEP + 5 :]),
    }


def make_trainer(device: torch.device, callbacks: list[pl.Callback], steps: int) -> pl.Trainer:
    from pytorch_lightning.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler(device.type)
    return pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        plugins=[MixedPrecision("16-mixed", device.type, scaler)],  # real fp16 on a CPU too
        max_steps=steps,
        logger=grad_norm.KeepNothing(),
        log_every_n_steps=50,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def arguments() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter blocks and fewer rounds")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--workloads", default="transformer,small_tensors" if cuda else "small_tensors")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.rounds = options.rounds if options.rounds is not None else (3 if options.quick else 7)
    options.workloads = options.workloads.split(",")
    return options


if __name__ == "__main__":
    main()
