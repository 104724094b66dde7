"""Runs that really spike: a byte-level GPT on the standard library's source, and what each way makes of it.

Cases: `bursts` (three corrupted batches in a row, at random places), `weight` and `moment` (a flipped exponent bit, in
a weight and in Adam's first moment), `rate` (a learning rate ten times too high, without warm-up), and healthy runs
of three kinds: `text`, `images`, `heavy_tails`.

ZClip and OLMo's skip-step are written from their published descriptions. arc-training takes part if it is installed.

usage: python benchmarks/spikes.py [--device cuda] [--seeds 5] [--steps N] [--cases a,b] [--ways a,b] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
import sysconfig
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from common import machine, quiet, save  # noqa: E402

from lightning_stability import NaNEarlyStop, SpikeRecovery  # noqa: E402

SIZES = {  # width, layers, heads, context, batch, steps, learning rate
    "cpu": (48, 1, 4, 48, 16, 300, 3e-3),
    "cuda": (384, 6, 6, 256, 64, 700, 1e-3),
}
HEALTHY = ("text", "images", "heavy_tails")
CASES = ("bursts", "weight", "moment", "rate", *HEALTHY)
QUIET_START = 100
"""No fault before this step."""


# What is trained.


class GPT(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.places = nn.Embedding(context, width)
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.bytes(x) + self.places.weight[: x.shape[1]]
        return self.head(self.blocks(hidden, mask=self.mask, is_causal=True))


class Module(pl.LightningModule):
    """Any of the workloads, with a fault at one step."""

    def __init__(self, net: nn.Module, loss: Callable[..., Tensor], rate: float, fault: tuple[str, int, int]) -> None:
        super().__init__()
        self.net, self.loss, self.rate, self.fault, self.losses = net, loss, rate, fault, []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net, *batch)

    def configure_optimizers(self) -> Any:
        fused = self.device.type == "cuda"
        return torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=0.01, fused=fused)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        kind, step, seed = self.fault
        if kind in ("weight", "moment") and batch_idx == step:
            flip_bit(self, kind, random_numbers(seed))


def flip_bit(module: Module, kind: str, generator: torch.Generator) -> None:
    """Flip an exponent bit that makes a number 2^8 to 2^64 times as large."""
    weights = [p for p in module.net.parameters() if p.dim() == 2]
    weight = weights[int(torch.randint(len(weights), (), generator=generator))]
    target = weight.detach() if kind == "weight" else module.trainer.optimizers[0].state[weight]["exp_avg"]
    flat = target.view(-1)
    place = int(torch.randint(flat.numel(), (), generator=generator))
    power = (8, 16, 32, 64)[int(torch.randint(4, (), generator=generator))]
    flat[place] = (flat[place].abs() + 1e-3) * 2.0**power


def random_numbers(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def source_text() -> Tensor:
    """The standard library's source, in one order everywhere."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)


def text_batches(count: int, batch: int, context: int, generator: torch.Generator, of: Tensor) -> Tensor:
    starts = torch.randint(len(of) - context - 1, (count * batch, 1), generator=generator)
    return of[starts + torch.arange(context + 1)].long()


def next_byte_loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(net(x).flatten(0, 1).float(), y.flatten())


def corrupt(x: Tensor, y: Tensor, batch: int, steps: int, seed: int) -> set[int]:
    """Three batches in a row, of three kinds by turns: random, repeated samples, labels shifted by one."""
    generator, bad = random_numbers(seed), set()
    bursts = 12 * (steps - QUIET_START) // 600
    starts = torch.randperm((steps - QUIET_START) // 4, generator=generator)[:bursts] * 4 + QUIET_START
    for number, start in enumerate(starts.tolist()):
        for step in range(start, min(start + 3, steps)):
            bad.add(step)
            part = slice(step * batch, (step + 1) * batch)
            if number % 3 == 0:
                x[part] = torch.randint(256, x[part].shape, generator=generator)
                y[part] = torch.randint(256, y[part].shape, generator=generator)
            elif number % 3 == 1:
                x[part], y[part] = x[part][:1, :1], torch.randint(256, (1,), generator=generator)
            else:
                y[part] = y[part].roll(1, dims=1)
    return bad


def workload(
    case: str, seed: int, device: str, steps: int
) -> tuple[Module, DataLoader[Any], tuple[Tensor, ...], set[int]]:
    """The module, its data, the batch it is validated on, and its corrupted batches."""
    width, layers, heads, context, batch, _, rate = SIZES[device]
    generator, bad = random_numbers(seed), set()
    torch.manual_seed(seed)
    step = QUIET_START + int(torch.randint(steps - QUIET_START - 60, (), generator=random_numbers(seed + 7)))
    if case == "images":
        means = torch.randn(10, 3, 16, 16, generator=random_numbers(1))
        labels = torch.randint(10, (steps * batch + 512,), generator=generator)
        x, y = means[labels] + 2 * torch.randn(len(labels), 3, 16, 16, generator=generator), labels
        net: nn.Module = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.BatchNorm2d(32)),
            *(nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)),
        )
        net(x[:2])
        loss = lambda net, x, y: functional.cross_entropy(net(x).float(), y)  # noqa: E731
    elif case == "heavy_tails":
        x = torch.randn(steps * batch + 512, 32, generator=generator)
        noise = torch.distributions.StudentT(3.0).sample((len(x),))
        y = x[:, :4].prod(1) + x[:, 4] + noise
        net = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 1))
        loss = lambda net, x, y: (net(x)[:, 0].float() - y).pow(2).mean()  # noqa: E731
    else:
        text = source_text()
        held_out = text[: len(text) // 20]
        windows = text_batches(steps, batch, context, generator, text[len(held_out) :])
        validation = text_batches(8, 64, context, random_numbers(0), held_out)
        x, y = windows[:, :-1].clone(), windows[:, 1:].clone()
        if case == "bursts":
            bad = corrupt(x, y, batch, steps, seed)
        x, y = torch.cat([x, validation[:, :-1]]), torch.cat([y, validation[:, 1:]])
        net, loss = GPT(width, layers, heads, context), next_byte_loss
        rate = 10 * rate if case == "rate" else rate
    module = Module(net, loss, rate, (case, step, seed))
    loader = DataLoader(TensorDataset(x[:-512], y[:-512]), batch_size=batch)
    return module, loader, (x[-512:], y[-512:]), bad


# The other ways.


class ZClip(Callback):
    """Norms more than 2.5 standard deviations above their moving average are clipped (arXiv 2504.02507)."""

    def __init__(self, alpha: float = 0.97, threshold: float = 2.5, warmup: int = 25) -> None:
        self.alpha, self.threshold, self.warmup = alpha, threshold, warmup
        self.first: list[float] = []
        self.mean = self.variance = 0.0

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        norm = float(nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]))
        if len(self.first) < self.warmup:
            self.first.append(norm)
            self.mean, self.variance = statistics.fmean(self.first), statistics.pvariance(self.first)
            return
        std = math.sqrt(self.variance)
        z = (norm - self.mean) / (std + 1e-6)
        if z > self.threshold:
            limit = self.mean + self.threshold**2 / z * std
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(limit / norm)
            norm = limit
        self.mean = self.alpha * self.mean + (1 - self.alpha) * norm
        self.variance = self.alpha * self.variance + (1 - self.alpha) * (norm - self.mean) ** 2


class SkipStep(Callback):
    """OLMo's: no step whose loss or norm is beyond 6 standard deviations of the last 128, spikes counted among them."""

    def __init__(self, sigma: float = 6.0, window: int = 128) -> None:
        self.sigma = sigma
        self.losses: deque[float] = deque(maxlen=window)
        self.norms: deque[float] = deque(maxlen=window)
        self.skipped: list[int] = []

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        self.loss = float(loss)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        norm = float(nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]))
        if self._is_out(self.loss, self.losses) or self._is_out(norm, self.norms):
            self.skipped.append(trainer.global_step)
            for parameter in module.parameters():
                parameter.grad = None
        self.losses.append(self.loss)
        self.norms.append(norm)

    def _is_out(self, value: float, window: deque[float]) -> bool:
        if len(window) < (window.maxlen or 0) // 2:
            return False
        return value - statistics.fmean(window) > self.sigma * statistics.stdev(window)


def spike_detection() -> Callback:
    return pl.callbacks.SpikeDetection(exclude_batches_path=tempfile.mkdtemp())


def arc() -> Callback:
    from arc.api.integrations import LightningCallback

    return LightningCallback(verbose=False)


WAYS: dict[str, tuple[Callable[[], list[Any]], float | None]] = {
    "bare": (list, None),
    "clipping at 1": (list, 1.0),
    "SpikeDetection": (lambda: [spike_detection()], None),
    "ZClip": (lambda: [ZClip()], None),
    "OLMo's skip-step": (lambda: [SkipStep()], None),
    **({"arc-training": (lambda: [arc()], None)} if importlib.util.find_spec("arc") else {}),
    "SpikeRecovery": (lambda: [SpikeRecovery(), NaNEarlyStop()], None),
    "SpikeRecovery, clipping": (lambda: [SpikeRecovery(), NaNEarlyStop()], 1.0),
}


# Runs.


def run(case: str, way: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    module, loader, validation, bad = workload(case, seed, device, steps)
    callbacks, clip = WAYS[way][0](), WAYS[way][1]
    recovery = next((c for c in callbacks if isinstance(c, SpikeRecovery)), None)
    skipped: list[int] = next((c.skipped for c in callbacks if isinstance(c, SkipStep)), [])
    if recovery is not None:
        recovery.on_record = watched(recovery.on_record, skipped)  # type: ignore[method-assign]
    said = None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if device == "cuda" else "32-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=clip,
            default_root_dir=folder,
            callbacks=callbacks,
        )
        began = time.perf_counter()
        try:
            trainer.fit(module, loader)
        except Exception as error:  # SpikeDetection ends a run so
            said = type(error).__name__
        seconds = time.perf_counter() - began
    ends = [str(w.message).splitlines()[0] for w in caught if "ended the run" in str(w.message)]
    module.eval()
    with torch.no_grad():
        final = float(module.loss(module.net.cpu(), *validation))
    return {
        **{"case": case, "way": way, "seed": seed, "val_loss": final, "steps": trainer.global_step},
        **{"ended": ends[0] if ends else said, "seconds": seconds, "bad": len(bad), "skipped": len(skipped)},
        "false_skips": len(set(skipped) - bad) if case in ("bursts", *HEALTHY) else None,
        "rewinds": recovery.rewinds if recovery is not None else 0,
        "left_out": recovery.left_out if recovery is not None else 0,
        "fault_at": module.fault[1] if case in ("weight", "moment") else None,
    }


def watched(on_record: Callable[[Any], None], skipped: list[int]) -> Callable[[Any], None]:
    def on(record: Any) -> None:
        on_record(record)
        if record.outcome == "spike":
            skipped.append(record.step)

    return on


def table(runs: list[dict[str, Any]]) -> str:
    """Median of the final validation loss (and its range), and what was skipped, by case."""
    lines = []
    for case in dict.fromkeys(r["case"] for r in runs):
        lines += [
            f"\n{case}",
            "| way | final loss | ended early | skipped | false | rewinds | time |",
            "|---|" + "---|" * 6,
        ]
        of_case = [r for r in runs if r["case"] == case]
        bare = {r["seed"]: r["seconds"] / max(r["steps"], 1) for r in of_case if r["way"] == "bare"}
        for way in dict.fromkeys(r["way"] for r in of_case):
            rows = [r for r in of_case if r["way"] == way]
            losses = sorted(r["val_loss"] if math.isfinite(r["val_loss"]) else math.inf for r in rows)
            ratio = [r["seconds"] / max(r["steps"], 1) / bare[r["seed"]] for r in rows if r["seed"] in bare]
            false = [r["false_skips"] for r in rows if r["false_skips"] is not None]
            losses_said = f"{statistics.median(losses):.3f} ({losses[0]:.3f} to {losses[-1]:.3f})"
            cells = [
                *(way, losses_said, f"{sum(bool(r['ended']) for r in rows)} of {len(rows)}"),
                *(sum(r["skipped"] for r in rows), sum(false) if false else "-", sum(r["rewinds"] for r in rows)),
                f"{statistics.median(ratio):.2f}" if ratio else "-",
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--ways", default=",".join(WAYS), help="separated by semicolons where a name has a comma")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    quiet()
    steps = args.steps or SIZES[args.device][5]
    ways = list(WAYS) if args.ways == ",".join(WAYS) else args.ways.split(";")
    runs: list[dict[str, Any]] = []
    for case in args.cases.split(","):
        for seed in range(args.seeds):
            for way in ways:
                runs.append(run(case, way, seed, args.device, steps))
                print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
        report = {"machine": machine(torch.device(args.device)), "steps": steps, "runs": runs}
        save(report, args.json)
    print(table(runs))


if __name__ == "__main__":
    main()
