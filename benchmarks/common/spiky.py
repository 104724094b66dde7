"""Workloads with faults: a byte-level GPT on the standard library's source, and healthy ones of other kinds.

Everything follows from a seed: weights, batches, where corrupted batches lie and which bit flips.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset


@dataclass(frozen=True)
class Size:
    """Of the GPT and of its run."""

    width: int
    layers: int
    heads: int
    context: int
    batch: int
    steps: int
    rate: float


SIZES = {"cpu": Size(48, 1, 4, 48, 16, 300, 3e-3), "cuda": Size(384, 6, 6, 256, 32, 600, 1e-3)}
QUIET_START = 100
"""No fault before this step."""
BURSTS_IN_600 = 12
WARM_UP = 30
LEAST_JUMP = 0.5
"""By so much at least a flipped bit raises the loss: one that nothing depends on harms no run."""


class GPT(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.places = nn.Embedding(context, width)
        nn.init.normal_(self.bytes.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.bytes(x) + self.places.weight[: x.shape[1]]
        return self.head(self.blocks(hidden, mask=self.mask, is_causal=True))


class Module(pl.LightningModule):
    """A network and its loss, trained with AdamW."""

    def __init__(self, net: nn.Module, loss: Callable[..., Tensor], rate: float, steps: int = 0) -> None:
        super().__init__()
        self.net, self.loss, self.rate, self.steps = net, loss, rate, steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net, *batch)

    def configure_optimizers(self) -> Any:
        # not fused: Lightning refuses to clip with a fused optimizer in mixed precision
        betas, decay = (0.9, 0.95), 0.1
        optimizer = torch.optim.AdamW(self.parameters(), self.rate, betas=betas, weight_decay=decay, foreach=True)
        if not self.steps:
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._share)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def _share(self, step: int) -> float:
        """Of the learning rate: it warms up, and falls to a tenth along a cosine."""
        done = min(step / self.steps, 1.0)
        return min((step + 1) / WARM_UP, 0.1 + 0.45 * (1 + math.cos(math.pi * done)))


class Batches(Dataset[Any]):
    """Whole batches, on the device already."""

    def __init__(self, tensors: tuple[Tensor, ...], batch: int) -> None:
        self.tensors, self.batch = tensors, batch

    def __len__(self) -> int:
        return len(self.tensors[0]) // self.batch

    def __getitem__(self, index: int) -> Any:
        return tuple(tensor[index * self.batch : (index + 1) * self.batch] for tensor in self.tensors)


@dataclass
class Workload:
    """What is trained on what, and what goes wrong in it.

    Attributes:
        bad: Steps whose batches are corrupted.
        fault_at: The step before which a bit flips.
        callbacks: What makes it flip.
        precision: On a GPU.
    """

    module: pl.LightningModule
    data: Dataset[Any]
    evaluate: Callable[[], float]
    bad: set[int] = field(default_factory=set)
    fault_at: int | None = None
    callbacks: list[pl.Callback] = field(default_factory=list)


def random_numbers(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The GPT, and what happens to it.


def source_text() -> Tensor:
    """The standard library's source, in one order everywhere."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)


def windows_of(text: Tensor, count: int, context: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(text) - context - 1, (count, 1), generator=generator)
    return text[starts + torch.arange(context + 1)].long()


def next_byte_loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(net(x).flatten(0, 1).float(), y.flatten())


def corrupt(x: Tensor, y: Tensor, batch: int, steps: int, seed: int) -> set[int]:
    """Three batches in a row, of three kinds by turns: random, repeated samples, labels shifted by one."""
    generator, bad = random_numbers(seed), set()
    bursts = BURSTS_IN_600 * (steps - QUIET_START) // 600
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


class FlipsBit(pl.Callback):
    """Before one step one exponent bit flips, in a weight or in Adam's first moment of it.

    The place is drawn until the loss of the batch rises by `LEAST_JUMP` and stays finite. A moment's flip shows in the
    weights of the step after it: it is judged by what that step is going to make of the weight.
    """

    def __init__(self, kind: str, step: int, seed: int) -> None:
        self.kind, self.step, self.seed = kind, step, seed
        self.flipped: str | None = None

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx != self.step:
            return
        generator = random_numbers(self.seed)
        weights = [(name, p) for name, p in module.net.named_parameters() if p.dim() == 2]
        with trainer.precision_plugin.forward_context():
            usual = float(module.loss(module.net, *batch))
            for _ in range(200):
                name, weight = weights[int(torch.randint(len(weights), (), generator=generator))]
                place = int(torch.randint(weight.numel(), (), generator=generator))
                factor = 2.0 ** (8, 16, 32, 64)[int(torch.randint(4, (), generator=generator))]
                if self._flip(trainer.optimizers[0], weight, place, factor, lambda: self._harms(module, batch, usual)):
                    self.flipped = f"{name}[{place}] times {factor:g}"
                    return

    def _harms(self, module: Any, batch: Any, usual: float) -> bool:
        loss = float(module.loss(module.net, *batch))
        return math.isfinite(loss) and loss > usual + LEAST_JUMP

    def _flip(self, optimizer: Any, weight: Tensor, place: int, factor: float, harms: Callable[[], bool]) -> bool:
        flat, state = weight.view(-1), optimizer.state[weight]
        before = flat[place].clone()
        if self.kind == "weight":
            flat[place] = (before.abs() + 1e-3) * factor
            if harms():
                return True
            flat[place] = before
            return False
        first, second = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        flipped = (first[place].abs() + 1e-3) * factor
        flat[place] -= optimizer.param_groups[0]["lr"] * flipped / (second[place].sqrt() + 1e-8)
        harmful = harms()
        flat[place] = before
        if harmful:
            first[place] = flipped
        return harmful


def text(case: str, seed: int, device: str, steps: int) -> Workload:
    """The GPT: `text` is healthy, `rate` ten times too fast, the other cases have faults."""
    size, target = SIZES[device], torch.device(device)
    source = source_text()
    held_out = source[: len(source) // 20]
    windows = windows_of(source[len(held_out) :], steps * size.batch, size.context, random_numbers(seed))
    validation = windows_of(held_out, 512, size.context, random_numbers(0))
    x, y = windows[:, :-1].clone(), windows[:, 1:].clone()
    bad = corrupt(x, y, size.batch, steps, seed) if case == "bursts" else set()
    net = GPT(size.width, size.layers, size.heads, size.context)
    rate, scheduled = (10 * size.rate, 0) if case == "rate" else (size.rate, steps)
    module = Module(net, next_byte_loss, rate, scheduled)

    def evaluate() -> float:
        net.to(target).eval()
        parts = [part.to(target) for part in (validation[:, :-1], validation[:, 1:])]
        with torch.no_grad():
            losses = [float(next_byte_loss(net, a, b)) for a, b in zip(*(p.split(64) for p in parts), strict=True)]
        return sum(losses) / len(losses)

    workload = Workload(module, Batches((x.to(target), y.to(target)), size.batch), evaluate, bad)
    if case in ("weight", "moment"):
        span = max(1, steps - QUIET_START - 60)
        workload.fault_at = QUIET_START + int(torch.randint(span, (), generator=random_numbers(seed + 7)))
        workload.callbacks = [FlipsBit(case, workload.fault_at, seed)]
    return workload


# Healthy workloads of other kinds.


def images(seed: int, device: str, steps: int) -> Workload:
    """Ten kinds of noisy pictures, a small convolutional network with batch norm."""
    generator, batch = random_numbers(seed), 32
    means = torch.randn(10, 3, 16, 16, generator=random_numbers(1))
    labels = torch.randint(10, (steps * batch + 512,), generator=generator)
    x = means[labels] + 2 * torch.randn(len(labels), 3, 16, 16, generator=generator)
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.BatchNorm2d(32)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)),
    )
    return _simple(net, lambda net, x, y: functional.cross_entropy(net(x).float(), y), x, labels, batch, device)


def heavy_tails(seed: int, device: str, steps: int) -> Workload:
    """A regression whose noise has three degrees of freedom."""
    generator, batch = random_numbers(seed), 32
    x = torch.randn(steps * batch + 512, 32, generator=generator)
    y = x[:, :4].prod(1) + x[:, 4] + torch.distributions.StudentT(3.0).sample((len(x),))
    net = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 1))
    return _simple(net, lambda net, x, y: (net(x)[:, 0].float() - y).pow(2).mean(), x, y, batch, device)


def _simple(net: nn.Module, loss: Callable[..., Tensor], x: Tensor, y: Tensor, batch: int, device: str) -> Workload:
    x, y = x.to(device), y.to(device)

    def evaluate() -> float:
        net.to(device).eval()
        with torch.no_grad():
            return float(loss(net, x[-512:], y[-512:]))

    return Workload(Module(net, loss, 1e-3), Batches((x[:-512], y[:-512]), batch), evaluate)


class EEGBatches(Dataset[Any]):
    """Noise on 19 channels; half of the windows have slow waves in it, as an abnormal recording may."""

    def __init__(self, seed: int, count: int, batch: int, seconds: float, device: str) -> None:
        generator = random_numbers(seed)
        self.label = torch.randint(2, (count, batch), generator=generator).to(device)
        time = torch.arange(int(seconds * 256)) / 256
        self.wave = torch.sin(2 * torch.pi * 2.0 * time).to(device)
        self.noise = torch.randn(4 * batch, 19, len(time), generator=generator).to(device)
        self.batch = batch

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> Any:
        start = (index * 7) % (len(self.noise) - self.batch)
        label = self.label[index]
        noise = self.noise[start : start + self.batch].roll(index * 13, dims=2)
        return {"eeg": noise + label[:, None, None] * self.wave, "label": label}


def eeg(seed: int, device: str, steps: int) -> Workload:
    """The included probe on a frozen encoder, with its own optimizer and schedule."""
    from lightning_stability.tuab import EEGPTProbe

    module = EEGPTProbe(encoder="small", window_seconds=1.0)
    data, held_out = (EEGBatches(s, n, 16, 1.0, device) for s, n in ((seed, steps), (99, 16)))

    def evaluate() -> float:
        module.to(device).eval()
        with torch.no_grad():
            batches = [held_out[index] for index in range(16)]
            return sum(float(functional.cross_entropy(module(b["eeg"]).float(), b["label"])) for b in batches) / 16

    return Workload(module, data, evaluate)


OTHERS: dict[str, Callable[[int, str, int], Workload]] = {"images": images, "heavy_tails": heavy_tails, "eeg": eeg}


def workload(case: str, seed: int, device: str, steps: int) -> Workload:
    """One of the cases, from a seed."""
    torch.manual_seed(seed)
    return OTHERS[case](seed, device, steps) if case in OTHERS else text(case, seed, device, steps)
