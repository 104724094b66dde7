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
        runtime = bench.runtime_of(trainer)
        runtime.begin_step(optimizer)
        runtime.measure(optimizer, module)
        meter = runtime._meters[optimizer]
        pointers = meter.pointers
        print("  way:", bench.way_of(meter))
        if pointers is not None and pointers.refused is None:
            self.kernels(pointers)
        self.hooks(trainer, module, optimizer)

    def kernels(self, pointers: Any) -> None:
        one, row = torch.ones((), device=self.device), pointers._new_row()
        [*sums], fill = pointers._launches[pointers._aligned]
        stream, addresses = pointers._stream, pointers._addresses
        held = [p.grad for p in pointers._parameters]
        timed = {
            "torch._foreach_norm": lambda: torch._foreach_norm(held),
            "p.grad": lambda: [p.grad for p in pointers._parameters],
            "addresses": lambda: list(map(torch.Tensor.data_ptr, held)),
            "look": pointers._look,
            "current stream": pointers._current_stream,
            "new row": pointers._new_row,
            "sums of squares": lambda: [launch(stream) for launch in sums],
            "row": lambda: fill(stream, one, one, row),
            "both": lambda: pointers._launch(row, (one, one)),
            "new addresses": lambda: pointers._send(addresses),
            "all": lambda: pointers.measure((one, one)),
        }
        for name, times in bench.interleaved(timed, self.device, 25).items():
            print(f"  {name:40s} {times['host_us']:9.1f} {times.get('device_us', float('nan')):9.1f}")

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
    for name in ("transformer", "small_tensors", "2000_tensors", "probe"):
        workload = bench.make_workload(name, device, quick=False)
        assert workload is not None
        print(json.dumps({"parts": name, "torch": torch.__version__}), "host us, device us")
        callbacks = [bench.GradNormMonitor(every_n_steps=10**6), Parts(device)]
        trainer = bench.make_trainer(workload, device, callbacks, None, 5)
        trainer.fit(workload.module, DataLoader(bench.SameBatch(workload.batch), batch_size=None))


if __name__ == "__main__":
    main()
