"""Runs of 120 small steps with a fault at step 75, and what each way makes of them. Every outcome is observed."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
import re
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from common.blocks import KeepNothing
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rivals.rows import Attached

EPOCHS, BATCHES, BAD = 4, 30, 75
STEPS = EPOCHS * BATCHES
EPOCH_METRICS = ("loss_epoch", "score", "val_loss")
BEYOND_FP16 = 3e4
"""A layer multiplies by it and divides again; by twice as much, and fp16 cannot hold the product."""


class Net(nn.Module):
    """Batch normalisation, and a parameter that is not used before the fault."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.BatchNorm1d(16))
        self.head = nn.Linear(16, 1)
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).squeeze(1)


class Regression(pl.LightningModule):
    """Trained on batches that are the same for all ways; the fault happens where a user's would."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.fault, self.step = Net(), fault, -1

    def happens(self) -> bool:
        """Whether the fault happens in this step."""
        after = self.step - BAD
        return {"burst": 0 <= after < 5, "every_batch": after >= 0, "every_tenth": after >= 0 and after % 10 == 0}.get(
            self.fault.partition(":")[2], after == 0
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.step += 1
        x, y = batch
        kind, bad = self.fault.partition(":")[0], self.happens()
        if bad and kind == "weight":
            self.net.head.weight.data[0, 0] = torch.nan
        if bad and kind == "optimizer_state":
            state = self.trainer.optimizers[0].state[self.net.head.weight]
            state["exp_avg"][0, 0] = torch.nan
        if bad and kind == "spike":
            y = y * 300
        if kind == "rate":
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = 1e6 if bad else 1e-2
        if bad and kind == "buffer":
            with torch.no_grad():  # a second batch, whose output nobody uses
                self.net(_with(x, torch.nan))
        if bad and kind in SPOIL_INPUT:
            x = SPOIL_INPUT[kind](x)
        if kind.startswith("fp16"):
            large = 2 * BEYOND_FP16 if bad else BEYOND_FP16
            x = torch.matmul(x, torch.eye(12) * large) / large
        loss = nn.functional.mse_loss(self.net(x).float(), y)
        if bad and kind in SPOIL_LOSS:
            loss = SPOIL_LOSS[kind](loss, self.net)
        elif kind == "optimizer_makes_nan" and self.step >= BAD:
            loss = loss + 0 * self.net.spare.sum()
        self.log("score", loss.detach() * (torch.nan if bad and kind == "metric" else 1), on_step=False, on_epoch=True)
        self.log("loss", loss.detach(), on_step=True, on_epoch=True)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.happens() and self.fault == "gradient_in_hook":
            self.net.head.weight.grad[0, 0] = torch.nan

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(x).float(), y))

    def configure_optimizers(self) -> Any:
        if self.fault == "spike":
            return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=0.0 if self.fault == "optimizer_makes_nan" else 1e-8)


def _with(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[0, 0] = value
    return x


def _bad_gradient(loss: Tensor, net: Net, value: float) -> Tensor:
    net.head.weight.register_hook(lambda gradient: torch.full_like(gradient, value))
    return loss


SPOIL_INPUT: dict[str, Callable[[Tensor], Tensor]] = {
    "nan_batch": lambda x: _with(x, math.nan),
    "inf_batch": lambda x: _with(x, math.inf),
}
SPOIL_LOSS: dict[str, Callable[[Tensor, Net], Tensor]] = {
    "nan_loss": lambda loss, net: loss * math.nan,
    "inf_loss": lambda loss, net: loss * math.inf,
    "nan_gradient": lambda loss, net: loss + torch.sqrt((net.head.weight * 0).sum().abs()),
    "inf_gradient": lambda loss, net: loss + _Slope.apply(net.head.bias).sum(),
    "loss_1e10": lambda loss, net: loss * 1e10,
    "loss_1e15": lambda loss, net: loss * 1e15,
}


class _Slope(torch.autograd.Function):
    """0, with an infinite derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return torch.full_like(gradient, torch.inf)


FAULTS = {
    "nan_batch": "NaN in a batch",
    "inf_batch": "infinity in a batch",
    "nan_loss": "NaN loss",
    "nan_gradient": "NaN gradient of a finite loss",
    "gradient_in_hook": "gradient made NaN in the module's hook",
    "buffer": "NaN in a batch norm's buffer",
    "metric": "NaN in a logged metric",
    "optimizer_makes_nan": "the optimizer makes NaN (eps=0)",
    "spike": "targets of a batch 300 times too large (SGD)",
    "fp16_overflow": "a batch that overflows fp16",
    "fp16_overflow:every_batch": "fp16, and every batch overflows",
    "inf_loss": "infinite loss",
    "loss_1e10": "loss times 1e10",
    "weight": "a weight becomes NaN",
    "optimizer_state": "the optimizer's state becomes NaN",
    "rate": "learning rate 1e6 for a step",
    "inf_gradient": "infinite gradient",
    "nan_loss:burst": "NaN loss in five steps",
    "nan_batch:every_batch": "NaN in every batch",
    "loss_1e15:every_tenth": "loss times 1e15 in each tenth step",
}
OF_ARC = list(FAULTS)[11:]
"""Those that arc-training publishes to recover from; NaN loss and NaN gradient too."""


class Probe(pl.Callback):
    """Keeps the weights before each step, and the metrics of each epoch."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.metrics: list[float] = []
        self.held_out: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.weights.append(flat(pl_module))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.keep_metrics(trainer)

    def keep_metrics(self, trainer: Any) -> None:
        """Those of the epoch that has ended."""
        self.metrics += [float(value) for name, value in trainer.callback_metrics.items() if name in EPOCH_METRICS]

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.held_out.append(float(trainer.callback_metrics.get("val_loss", math.nan)))


def flat(module: nn.Module) -> Tensor:
    """All weights but the one that is not used."""
    return torch.cat([p.detach().flatten() for n, p in module.named_parameters() if "spare" not in n]).clone()


def data() -> tuple[DataLoader[Any], DataLoader[Any]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCHES * 32 + 128, 12, generator=generator).clamp(-2, 2)
    x[:, 0] = 1.9 + x[:, 0].abs() / 20  # so that twice as much overflows in every batch, and the usual does not
    y = torch.sin(x[:, 1:4]).sum(dim=1)
    samples = list(zip(x, y, strict=True))
    return DataLoader(samples[: BATCHES * 32], batch_size=32), DataLoader(samples[BATCHES * 32 :], batch_size=32)


def run(attached: Attached, fault: str) -> dict[str, Any]:
    """Train with a fault; what was seen of it."""
    module, probe, log = Regression(fault), Probe(), io.StringIO()
    options: dict[str, Any] = dict(attached.options)
    if fault.startswith("fp16"):
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))]
    raised: BaseException | None = None
    with said_to(log), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *rest: log.write(f"{message}\n")  # type: ignore[assignment]
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=EPOCHS,
            logger=KeepNothing(),
            log_every_n_steps=10,
            num_sanity_val_steps=0,
            callbacks=[probe, *attached.callbacks],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        try:
            trainer.fit(module, *data())
        except BaseException as error:
            raised = error
        try:
            log.write(attached.findings())
        except Exception as error:
            log.write(f"asking for findings raised {error!r}")
    text = log.getvalue() + ("" if raised is None else f"\n{type(raised).__name__}: {raised}")
    return {**observed(module, trainer, probe), **ended(raised, attached, module), "text": text}


def ended(raised: BaseException | None, attached: Attached, module: Regression) -> dict[str, Any]:
    """How the run came to its end."""
    own = raised is not None and type(raised).__name__ in attached.stops
    return {
        "raised": None if raised is None else f"{type(raised).__name__}: {str(raised)[:160]}",
        "crashed": raised is not None and not own,
        "stopped": own or (raised is None and module.step + 1 < STEPS),
        "steps": module.step + 1,
    }


def observed(module: Regression, trainer: Any, probe: Probe) -> dict[str, Any]:
    """What the fault did to the run."""
    weights = [*probe.weights, flat(module)]
    moved = [float((after - before).norm()) for before, after in itertools.pairwise(weights)]
    state = [t for s in trainer.optimizers[0].state.values() for t in s.values() if isinstance(t, Tensor)]
    probe.keep_metrics(trainer)
    harm = {
        "weights": not all(bool(torch.isfinite(p).all()) for p in module.parameters()),
        "optimizer state": not all(bool(torch.isfinite(t).all()) for t in state),
        "buffers": not all(bool(torch.isfinite(b).all()) for b in module.buffers()),
        "epoch metrics": not all(map(math.isfinite, probe.metrics)),
    }
    usual = statistics.median(moved[BAD - 20 : BAD] or [math.nan])
    after = moved[BAD + 1 :]
    at = moved[BAD] if len(moved) > BAD else math.nan
    harm["jump"] = math.isfinite(at) and at > 10 * usual and not _back(weights)
    harm["held-out loss doubled"] = len(probe.held_out) > 2 and probe.held_out[-1] > 2 * probe.held_out[1]
    harm["no more updates"] = len(after) >= 10 and statistics.median(after[-10:]) < 1e-3 * usual
    return {
        "harm": [name for name, is_so in harm.items() if is_so],
        "update": "none" if len(weights) > BAD + 1 and torch.equal(weights[BAD + 1], weights[BAD]) else "made",
        "rolled_back": _back(weights),
        "update_ratio": at / usual if math.isfinite(at) else None,
        "last_weights": weights[-1].tolist(),
        "val_loss": float(trainer.callback_metrics.get("val_loss", math.nan)),
    }


def _back(weights: list[Tensor]) -> int:
    """How many steps the weights went back after the fault, at most; 0 if they did not."""
    known = {tuple(w.tolist()): place for place, w in reversed(list(enumerate(weights[: BAD + 1])))}
    later = [known.get(tuple(w.tolist())) for w in weights[BAD + 1 :]]
    return max((BAD - place for place in later if place is not None), default=0)


@contextlib.contextmanager
def said_to(log: io.StringIO) -> Any:
    """Everything that is printed or logged goes there."""
    handler = logging.StreamHandler(log)
    ours = [
        f"{name}{more}" for name in ("pytorch_lightning", "lightning.pytorch") for more in ("", ".utilities.rank_zero")
    ]
    names = [None, *ours, "arc", "trainscope", "lightning_stability"]
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger, logger.level) for logger in loggers]
    for logger in loggers:
        if not logger.name.endswith("rank_zero"):  # what it says reaches its parent
            logger.addHandler(handler)
        logger.setLevel(logging.INFO if logger.name != "root" else logging.WARNING)
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield
    finally:
        for logger, level in before:
            logger.removeHandler(handler)
            logger.setLevel(level)


_VALUE = re.compile(r"[\w/ .()]+\s*[=:]\s*([-+]?(nan|inf)\b|0\b)|\b(0|no)( [a-z]+){1,2}|^#+ .*", re.IGNORECASE)
"""A number, a count of none, or a heading."""
_ALARM = re.compile(
    r"\b(nan|inf|infinit\w*|non-?finite|not finite|spik\w*|anomal\w*|explo\w*|diverg\w*|skipp\w*|roll(ed)? ?back\w*"
    r"|unstable|instabilit\w*|overflow\w*|corrupt\w*|failure:|invalid|critical|restored|rising|too high|exceed\w*)\b",
    re.IGNORECASE,
)


def alarms(text: str, healthy: str = "") -> list[str]:
    """The lines that say that something is wrong, and that a healthy run does not have. A number alone says nothing."""

    def plain(line: str) -> str:
        return re.sub(r"[-+]?\d[\d.e+-]*", "#", line).strip()

    known = {plain(line) for line in healthy.splitlines()}
    lines = [line.strip() for line in text.splitlines() if plain(line) not in known]
    return [line[:200] for line in lines if _ALARM.search(_VALUE.sub("", line))]


def outcome(seen: dict[str, Any], bare: dict[str, Any], fault: str) -> str:
    """One of the words of the table; `bare` is what the same fault does to a bare Trainer."""
    if seen["crashed"]:
        return "crashed"
    passing = {"no more updates"} if seen["stopped"] else set()
    passing |= set() if fault == "metric" else {"epoch metrics"}  # those have a mark of their own
    lasting = set(seen["harm"]) - passing
    if seen["stopped"]:
        return "stopped after" if lasting else "stopped before"
    if lasting:
        return "landed" if seen["alarms"] else "unnoticed"
    if seen["rolled_back"]:
        return "rolled back"
    if seen["update"] == "none":
        return "skipped"
    return "repaired" if bare["harm"] or bare["crashed"] else "no harm"
