"""Where the hook time goes on a GPU. For one measurement: delete it afterwards."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import grad_norm as bench
import pytorch_lightning as pl
from torch.utils.data import DataLoader


class Parts(pl.Callback):
    done = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if trainer.global_step != 3 or self.done:
            return
        self.done = True
        parameters = [p for p in module.parameters() if p.grad is not None]
        held = [p.grad for p in parameters]
        norms = {dtype: torch._foreach_norm(held, 2, dtype) for dtype in (None, torch.float64)}
        wide = torch.empty(len(held), dtype=torch.float64, device=self.device)
        slots = list(wide.unbind())
        eight = list(norms[torch.float64]) * 8
        one = torch.ones((), device=self.device)
        event = torch.cuda.Event() if self.device.type == "cuda" else None
        pinned = torch.empty(len(held), dtype=torch.float64, pin_memory=event is not None)

        def inference(function: Any) -> Any:
            def run() -> Any:
                with torch.inference_mode():
                    return function()

            return run

        def to_host() -> None:
            pinned.copy_(wide, non_blocking=True)
            if event is not None:
                event.record()

        timed = {
            "norm, grad mode": lambda: torch._foreach_norm(held),
            "norm, inference": inference(lambda: torch._foreach_norm(held)),
            "norm float64, grad mode": lambda: torch._foreach_norm(held, 2, torch.float64),
            "norm float64, inference": inference(lambda: torch._foreach_norm(held, 2, torch.float64)),
            "norm float64 + 1 rider, inference": inference(lambda: torch._foreach_norm([*held, one], 2, torch.float64)),
            "p.grad": lambda: [p.grad for p in parameters],
            "stack, grad mode": lambda: torch.stack(norms[torch.float64]),
            "stack, inference": inference(lambda: torch.stack(norms[torch.float64])),
            "stack out, inference": inference(lambda: torch.stack(norms[torch.float64], out=wide)),
            "stack of 8 steps, inference": inference(lambda: torch.stack(eight)),
            "foreach_copy_, grad mode": lambda: torch._foreach_copy_(slots, norms[torch.float64]),
            "foreach_copy_, inference": inference(lambda: torch._foreach_copy_(slots, norms[torch.float64])),
            "copy to pinned + event": to_host,
            "clone of a number": lambda: one.clone(),
        }
        for name, times in bench.interleaved(timed, self.device, 25).items():
            print(f"  {name:40s} {times['host_us']:9.1f} {times.get('device_us', float('nan')):9.1f}")
        self.hooks(trainer, module, optimizer)

    def hooks(self, trainer: Any, module: Any, optimizer: Any) -> None:
        runtime, loss, clock = bench.runtime_of(trainer), torch.ones((), device=self.device), time.perf_counter
        names = ("note_loss", "begin_step", "measure", "finish_step (send, read)")
        columns: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(40):
            sums = dict.fromkeys(names, 0.0)
            for _ in range(8):
                bench.synchronise(self.device)
                times = [clock()]
                for call in (
                    lambda: runtime.note_loss(loss),
                    lambda: runtime.begin_step(optimizer),
                    lambda: runtime.measure(optimizer, module),
                    runtime.finish_step,
                ):
                    call()
                    times.append(clock())
                for name, start, end in zip(names, times, times[1:], strict=False):
                    sums[name] += 1e6 * (end - start) / 8
            for name in names:
                columns[name].append(sums[name])
        for name, values in columns.items():
            print(f"  {name:40s} {sorted(values)[20]:9.1f}")
        runtime.begin_step(optimizer)


def main() -> None:
    bench.quiet()
    sys.stdout.reconfigure(line_buffering=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("transformer", "small_tensors"):
        workload = bench.make_workload(name, device, quick=False)
        assert workload is not None
        print(json.dumps({"parts": name, "torch": torch.__version__}), "host us, device us")
        callbacks = [bench.GradNormMonitor(every_n_steps=10**6), Parts(device)]
        trainer = bench.make_trainer(workload, device, callbacks, None, 5)
        trainer.fit(workload.module, DataLoader(bench.SameBatch(workload.batch), batch_size=None))


if __name__ == "__main__":
    main()
