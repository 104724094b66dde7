"""What people combine with the callbacks, and what becomes of it: the cases behind docs/compatibility.md.

`python -m tests.compatibility` writes the page; `tests/test_compatibility.py` proves every line of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_stability import InputCheck

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
WORKS = "works"
BAD_BATCH = 2

HEAD = """# What works together

Written by `python -m tests.compatibility` from the cases in `tests/compatibility.py`. Each line is a run with both
`NaNEarlyStop(patience=1)` and `GradNormMonitor()`. *Works* means: a batch with a NaN loss in the middle of the run
is skipped, the run goes on to its end, every weight and buffer is finite, and gradient norms were logged. *Refused*
means: an error before the first step that gives this reason. Automatic callbacks (see
[Installed and forgotten](installed.md)) refuse nothing; they stand aside with one line that gives the reason.

"""


@dataclass(frozen=True)
class Case:
    """One line of the page."""

    name: str
    options: Callable[[Any], dict[str, Any]] = lambda pl: {}
    answer: str = WORKS
    optimizer: Callable[[Any], Any] = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)
    base: str = "automatic"
    where: str = ""
    """"" for every machine, "slow", "gpu" or "distributed" (two processes)."""
    data: Callable[[], Any] = field(default=lambda: _loader())

    def refused_because(self) -> str | None:
        """The reason; None if it works."""
        return self.answer.removeprefix("refused at setup: ") if self.answer != WORKS else None


class _Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(0)))


def _loader() -> Any:
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(24, 6)), batch_size=4)


def _callback(name: str, **arguments: Any) -> Callable[[Any], dict[str, Any]]:
    return lambda pl: {"callbacks": [getattr(pl.callbacks, name)(**arguments)]}


def _named(name: str) -> Callable[[Any], dict[str, Any]]:
    """A strategy of this class name: what is refused is told by the name, and most need hardware to be made."""

    def options(pl: Any) -> dict[str, Any]:
        strategy = type(name, (pl.strategies.SingleDeviceStrategy,), {})
        return {"strategy": strategy(device=torch.device("cpu"))}

    return options


def _options(**options: Any) -> Callable[[Any], dict[str, Any]]:
    return lambda pl: options


def _fp16(pl: Any) -> dict[str, Any]:
    if torch.cuda.is_available():
        return {"precision": "16-mixed"}
    return {"plugins": [pl.plugins.MixedPrecision("16-mixed", "cpu")]}


def _shards() -> str:
    return "refused at setup: its parameters are this rank's flat shard; use ModelParallelStrategy (FSDP2)"


CASES: dict[str, list[Case]] = {
    "Strategies": [
        Case("one device"),
        Case("`ddp`", _options(strategy="ddp", devices=2), where="distributed"),
        Case("`ddp_fork`, as notebooks use", _options(strategy="ddp_fork", devices=2), where="distributed"),
        Case("`ddp_find_unused_parameters_true`", _options(strategy="ddp_find_unused_parameters_true", devices=2),
             where="distributed"),
        Case("FSDP1 (`fsdp`)", _named("FSDPStrategy"), _shards()),
        Case(
            "`deepspeed`",
            _named("DeepSpeedStrategy"),
            "refused at setup: its engine keeps and clips the gradients; use DDP or ModelParallelStrategy",
        ),
        Case(
            "XLA (`xla`, `xla_fsdp`)",
            _named("XLAStrategy"),
            "refused at setup: its tensors have no multi-tensor norm; leave the callback out",
        ),
    ],
    "Precisions": [
        Case("`32-true`"),
        Case("`64-true`", _options(precision="64-true")),
        Case("`bf16-mixed`", _options(precision="bf16-mixed")),
        Case("`bf16-true`", _options(precision="bf16-true")),
        Case("`16-mixed`", _fp16),
        Case("`16-mixed` on a GPU", _options(precision="16-mixed"), where="gpu"),
        Case(
            "`16-true`, eps of 1e-4",
            _options(precision="16-true"),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, eps=1e-4),
        ),
        Case(
            "`16-true`, eps of 1e-8",
            _options(precision="16-true"),
            "refused at setup: eps is 0 in fp16, so the first update divides by zero",
        ),
    ],
    "Optimizers": [
        *(
            Case(f"`{name}`", optimizer=lambda parameters, name=name: getattr(torch.optim, name)(parameters, lr=1e-3))
            for name in ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam")
        ),
        Case("`AdamW(fused=True)`", optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)),
        Case(
            "`SGD(momentum=0.9, fused=True)`", optimizer=lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, fused=True)
        ),
        Case(
            "`LBFGS`",
            answer="refused at setup: it evaluates several gradients within one step",
            optimizer=lambda parameters: torch.optim.LBFGS(parameters, lr=1e-3),
        ),
    ],
    "Loops": [
        Case("gradient accumulation", _options(accumulate_grad_batches=2)),
        Case("clipping by norm", _options(gradient_clip_val=0.1)),
        Case("clipping by value", _options(gradient_clip_val=0.1, gradient_clip_algorithm="value")),
        Case("manual optimization, two optimizers", base="manual"),
        Case("an iterable dataset of unknown length", data=lambda: DataLoader(_Stream(), batch_size=None)),
        Case("validation inside of the epoch", _options(val_check_interval=2)),
        Case("`max_steps`", _options(max_steps=9, max_epochs=-1)),
        Case("`max_time`", _options(max_time="00:00:01:00")),
        Case("`limit_train_batches`", _options(limit_train_batches=4)),
        Case("`overfit_batches`", _options(overfit_batches=4)),
        Case("`detect_anomaly`: it raises on the NaN itself, before anybody can skip it",
             _options(detect_anomaly=True), "raises RuntimeError, as without the callbacks"),
        Case("`torch.compile`", base="compiled", where="slow"),
    ],
    "Callbacks": [
        Case("`ModelCheckpoint`", lambda pl: {**_callback("ModelCheckpoint", monitor="val_loss")(pl),
                                             "enable_checkpointing": True}),
        Case("`EarlyStopping`", _callback("EarlyStopping", monitor="val_loss", patience=9)),
        Case("`LearningRateMonitor`", _callback("LearningRateMonitor")),
        Case("`StochasticWeightAveraging`", _callback("StochasticWeightAveraging", swa_lrs=1e-3, swa_epoch_start=1)),
        Case("`EMAWeightAveraging`", _callback("EMAWeightAveraging")),
        Case("`GradientAccumulationScheduler`", _callback("GradientAccumulationScheduler", scheduling={1: 2})),
        Case("`BatchSizeFinder`", lambda pl: {
            "callbacks": [pl.callbacks.BatchSizeFinder(max_trials=1, steps_per_trial=1)]}, base="tuned"),
        Case("`LearningRateFinder`", _callback("LearningRateFinder", num_training_steps=5), base="tuned"),
        Case("`InputCheck`", lambda pl: {"callbacks": [InputCheck()]}),
        Case('`InputCheck(action="skip")`', lambda pl: {"callbacks": [InputCheck(action="skip")]}),
        Case('`InputCheck(action="raise")`', lambda pl: {"callbacks": [InputCheck(action="raise")]}),
        Case("`Timer`", _callback("Timer", duration="00:00:01:00")),
        Case("`SpikeDetection`", lambda pl: {"callbacks": [_spike(pl)]}),
        Case("`LambdaCallback`", _callback("LambdaCallback")),
        Case("`DeviceStatsMonitor`", _callback("DeviceStatsMonitor", cpu_stats=False)),
        Case("`ModelPruning`", _callback("ModelPruning", pruning_fn="l1_unstructured", amount=0.1)),
        Case("`TQDMProgressBar`", lambda pl: {**_callback("TQDMProgressBar")(pl), "enable_progress_bar": True}),
    ],
}  # fmt: skip


def _spike(pl: Any) -> Any:
    return importlib.import_module(f"{pl.__name__}.callbacks.spike").SpikeDetection(warmup=50)


def cases() -> list[Case]:
    """All of them."""
    return [case for group in CASES.values() for case in group]


def page() -> str:
    """The page's text."""
    lines = [HEAD.rstrip()]
    shown = {"distributed": "two processes", "gpu": "a GPU", "slow": "CPU and GPU", "": "CPU and GPU"}
    for title, group in CASES.items():
        lines += ["", f"## {title}", "", "| | answer | proved on |", "|---|---|---|"]
        lines += [f"| {case.name} | {case.answer} | {shown[case.where]} |" for case in group]
    return "\n".join(lines) + "\n"


def make_module(pl: Any, case: Case) -> Any:
    """A module with batch norm and dropout whose third batch has a NaN loss."""

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 1))
            self.lr = 1e-3
            self.batch_size = 4
            self.automatic_optimization = case.base != "manual"
            self.forward_pass: Callable[[Tensor], Tensor] = (
                torch.compile(self.net) if case.base == "compiled" else self.net
            )
            self.seen = -1

        def loss(self, batch: Any) -> Tensor:
            x = batch if isinstance(batch, Tensor) else batch[0]
            return self.forward_pass(x.reshape(-1, 6).to(self.net[0].weight.dtype)).float().pow(2).mean()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            tuning = not any(type(c).__name__ == "NaNEarlyStop" for c in self.trainer.callbacks)
            self.seen += not tuning
            factor = float("nan") if self.seen == BAD_BATCH and not tuning else 1.0
            if self.automatic_optimization:
                return self.loss(batch) * factor
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch) * factor)
                optimizer.step()
            return None

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch), sync_dist=True)

        def configure_optimizers(self) -> Any:
            if case.base == "manual":
                return [case.optimizer(layer.parameters()) for layer in (self.net[0], self.net[4])]
            return case.optimizer(self.parameters())

        def train_dataloader(self) -> Any:
            return case.data()

        val_dataloader = train_dataloader

    return Module()


if __name__ == "__main__":
    PAGE.write_text(page())
