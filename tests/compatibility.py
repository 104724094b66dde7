"""What people combine with the callbacks, and what becomes of it: the cases behind docs/compatibility.md.

`python -m tests.compatibility` writes the page; `tests/test_compatibility.py` tests every line of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_stability import InputCheck
from tests.lightning_suite import EXPECTED

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
WORKS = "works"
BAD_BATCH = 2

HEAD = """# What works together

Whether a strategy, a precision, an optimizer or another callback works with these callbacks. Each line of the tables is
a run, made by the cases in `tests/compatibility.py`. `python -m tests.compatibility` writes the page.

- **Works** is defined above each group of tables.
- **Refused** means: an error before the first step that gives this reason. Automatic callbacks (see
  [Installed and forgotten](installed.md)) refuse nothing. They disable themselves, with one line that gives the reason.
- **Tested on** says where the run was made: most runs on a CPU. Two processes on a CPU exchange tensors with gloo, not
  with NCCL as GPUs do.

A combination that is not on this page was not tested.

## Platforms

| | what is known |
|---|---|
| Linux, CPU | tested: torch 2.13, pytorch-lightning 2.6.6, Python 3.11 |
| Linux, oldest versions | fast tests: torch 2.7.0, pytorch-lightning 2.6.0, Python 3.10 (`make test-oldest`) |
| Linux, NVIDIA GPU | tested on H100 and H200: torch 2.11, Python 3.12 |
| AMD GPU, Intel GPU | not tested |
| Apple's GPU (MPS), macOS | not tested |
| Windows | not tested; the included trainer needs `fcntl`, and its scripts bash and tmux |
| TPU (XLA) | not tested on one; the tables say what is refused |

## Loggers

| logger | numbers | skips, stops and changes of precision |
|---|---|---|
| TensorBoard | yes, with one chart for the groups of gradient norms | a text |
| W&B | yes; the x-axis is `trainer/global_step` | an alert, and an entry of the run's summary |
| MLflow | yes | a tag |
| CSVLogger | yes; of the automatic `GradNormMonitor` no | nothing |
| any other logger of Lightning | yes | nothing |

W&B was tested offline and MLflow with a local store. A logger that raises does not end the run: one warning names the
error, and that logger gets nothing more.

## When one rank raises an exception

A *rank* is one of several processes. If one raises an exception, the others wait for it at their next exchange of
tensors (a *collective*). The rank that raised cannot end either: Lightning closes the connection at exit, and with
NCCL, the library for GPUs, that waits for the others.

If one rank skips a bad step and another one did not see it as bad, the rank raises `RanksDisagreeError`. Before that
our callbacks abort the waiting collectives, so that the process can end. On two H200 the run then ended by itself in
58 s, and most of that was the 30 s for which torchrun waits. Without the abort it hung until it was killed. After an
exception in your own code nothing is aborted.
"""
ABOUT = {
    "guards": """## NaNEarlyStop and GradNormMonitor

Both together, `NaNEarlyStop(patience=1)` and `GradNormMonitor()`. *Works* means: a batch with a NaN loss in the middle
of the run is skipped, and the run continues to its end. Every weight and buffer is finite, and gradient norms were
logged.
""",
    "FractionalCheckpoint": """## FractionalCheckpoint

`FractionalCheckpoint(every_n_epochs=0.5, save_top_k=-1)`. *Works* means: every half epoch is saved, and every file is
complete and finite. A second run resumes from the first of them, in the middle of the first epoch. It ends with the
same bits in every weight and buffer.
""",
    "PrecisionFallback": """## PrecisionFallback

`PrecisionFallback()` in fp16 with a gradient scaler, unless the line says otherwise. *Works* means: a batch whose loss
overflows the 16-bit precision, and not fp32, is trained again in fp32. No batch is lost, and the run continues in fp32
to its end. Every weight and buffer is finite.
""",
}
"""What the lines of each section have in common, by the callback they are about."""
SUITE = """## Lightning's own tests

`python -m tests.lightning_suite` runs Lightning's own tests with this package installed and without it. They end the
same, with the exceptions below. The reason is one: the package's entry point is in every Trainer's list of callbacks,
and during a fit the automatic callbacks are too.
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
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of the callback that the section is about."""
    about: str = "guards"
    """The callback, a key of `ABOUT`; `cases` knows it from the section."""

    def refused_because(self) -> str | None:
        """The reason; None if it is not refused."""
        refused = "refused at setup: "
        return self.answer.removeprefix(refused) if self.answer.startswith(refused) else None


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
    return {"plugins": [pl.plugins.MixedPrecision("16-mixed", "cpu")]}


def _fp16_and(**options: Any) -> Callable[[Any], dict[str, Any]]:
    return lambda pl: {**_fp16(pl), **options}


def _fp16_of_a_kind_of_its_own(pl: Any) -> dict[str, Any]:
    return {"plugins": [type("MyPrecision", (pl.plugins.MixedPrecision,), {})("16-mixed", "cpu")]}


def _fsdp2(pl: Any) -> dict[str, Any]:
    return {"strategy": pl.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), "devices": 2}


def _fsdp2_in_16_bits(pl: Any) -> dict[str, Any]:
    return {**_fsdp2(pl), "precision": "bf16-mixed"}


def _named_in_16_bits(name: str) -> Callable[[Any], dict[str, Any]]:
    return lambda pl: {**_named(name)(pl), "precision": "bf16-mixed"}


def _carries(strategy: str) -> str:
    return f"refused at setup: cannot change the precision under {strategy}, whose parameters carry it from set-up"


def _stateful_loader() -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    torch.manual_seed(0)
    return StatefulDataLoader(TensorDataset(torch.randn(24, 6)), batch_size=4, shuffle=True)


def _saves(name: str, *arguments: Any, **others: Any) -> Case:
    return Case(name, *arguments, **{"data": _stateful_loader, **others})


def _adamw_for_fp16(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-4)


CASES: dict[str, list[Case]] = {
    "Strategies": [
        Case("one device"),
        Case("`ddp`", _options(strategy="ddp", devices=2), where="distributed"),
        Case("`ddp_fork`, as notebooks use", _options(strategy="ddp_fork", devices=2), where="distributed"),
        Case("`ddp_find_unused_parameters_true`", _options(strategy="ddp_find_unused_parameters_true", devices=2),
             where="distributed"),
        Case("FSDP2 (`ModelParallelStrategy`)", _fsdp2, base="fsdp2", where="distributed"),
        Case("FSDP1 (`fsdp`); `use_orig_params=False` gives the norms of units", _options(strategy="fsdp"),
             where="gpu"),
        Case(
            "`deepspeed`; `NaNEarlyStop` alone watches the loss there",
            _named("DeepSpeedStrategy"),
            "refused at setup: its engine keeps and clips the gradients; use DDP or ModelParallelStrategy",
        ),
        Case(
            "XLA (`xla`, `xla_fsdp`); `NaNEarlyStop` alone watches the loss there",
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
            optimizer=_adamw_for_fp16,
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

SAVED: dict[str, list[Case]] = {
    "Strategies": [
        _saves("one device", where="slow"),
        _saves("`ddp`", _options(strategy="ddp", devices=2), where="distributed"),
        _saves("FSDP2 (`ModelParallelStrategy`)", _fsdp2, base="fsdp2", where="distributed"),
        _saves("FSDP2, `async_save=True`", _fsdp2,
               base="fsdp2", where="distributed", arguments={"async_save": True}),
        _saves("`async_save=True`", arguments={"async_save": True}),
    ],
    "Precisions": [
        *(_saves(f"`{name}`", _options(precision=name), where=where) for name, where in
          {"32-true": "slow", "bf16-mixed": "slow", "bf16-true": ""}.items()),
        _saves("`64-true`", _options(precision="64-true")),
        _saves("`16-mixed`", _fp16),
        _saves("`16-true`", _options(precision="16-true"), optimizer=_adamw_for_fp16),
    ],
    "Data": [
        _saves("torchdata's `StatefulDataLoader`", where="slow"),
        _saves("torch's `DataLoader`", data=lambda: _loader()),
        _saves("an iterable dataset of unknown length",
               answer="refused at setup: has to know how long an epoch is, and the training data has no length. Give it"
               " steps_per_epoch=..., the optimizer steps of an epoch",
               data=lambda: DataLoader(_Stream(), batch_size=None)),
    ],
    "Loops": [
        _saves("gradient accumulation", _options(accumulate_grad_batches=2)),
        _saves("clipping by norm", _options(gradient_clip_val=0.1), where="slow"),
        _saves("manual optimization, two optimizers", base="manual"),
        _saves("validation inside of the epoch", _options(val_check_interval=2)),
        _saves("`max_steps`", _options(max_steps=9, max_epochs=-1)),
        _saves("`limit_train_batches`", _options(limit_train_batches=4), where="slow"),
        _saves("`fast_dev_run`", _options(fast_dev_run=2), "saves nothing, as ModelCheckpoint does"),
        _saves("`torch.compile`", base="compiled", where="slow"),
    ],
    "Callbacks": [
        _saves("a `ModelCheckpoint` beside it", _callback("ModelCheckpoint", monitor="val_loss")),
        _saves("`EarlyStopping`", _callback("EarlyStopping", monitor="val_loss", patience=9), where="slow"),
        _saves("`EMAWeightAveraging`", _callback("EMAWeightAveraging")),
        _saves("`GradientAccumulationScheduler`", _callback("GradientAccumulationScheduler", scheduling={1: 2}),
               where="slow"),
    ],
}  # fmt: skip

FALLEN_BACK: dict[str, list[Case]] = {
    "Strategies": [
        Case("one device", _fp16, where="slow"),
        Case("`ddp`", _fp16_and(strategy="ddp", devices=2), where="distributed"),
        Case("FSDP2 (`ModelParallelStrategy`)", _fsdp2_in_16_bits, _carries("ModelParallelStrategy"), base="fsdp2",
             where="distributed"),
        *(Case(f"`{name}`", _named_in_16_bits(strategy), _carries(strategy)) for name, strategy in
          {"fsdp": "FSDPStrategy", "deepspeed": "DeepSpeedStrategy"}.items()),
    ],
    "Precisions": [
        Case("`16-mixed`", _fp16),
        Case("`16-mixed` on a GPU", _options(precision="16-mixed"), where="gpu"),
        Case('`16-mixed`, `to="bf16-mixed"`', _fp16, arguments={"to": "bf16-mixed"}),
        Case("`bf16-mixed`", _options(precision="bf16-mixed")),
        Case("`16-true`", _options(precision="16-true"), optimizer=_adamw_for_fp16),
        Case("`16-true` in two processes", _options(precision="16-true", strategy="ddp", devices=2),
             "refused at setup: DDP's buckets are made for fp16 gradients. Use 16-mixed, whose weights are fp32",
             optimizer=_adamw_for_fp16, where="distributed"),
        *(Case(f"`{name}`", _options(precision=name), "has nothing to do, and costs nothing") for name in
          ("32-true", "64-true", "bf16-true")),
        Case("a custom precision plugin", _fp16_of_a_kind_of_its_own,
             "refused at setup: does not know how to leave MyPrecision; expected Lightning's MixedPrecision or"
             " HalfPrecision"),
    ],
    "Loops": [
        Case("gradient accumulation", _fp16_and(accumulate_grad_batches=2)),
        Case("clipping by norm", _fp16_and(gradient_clip_val=0.1)),
        Case("manual optimization, two optimizers", _fp16, base="manual",
             answer="works from the next step on: the batch is not trained again"),
        Case("an iterable dataset of unknown length", _fp16, data=lambda: DataLoader(_Stream(), batch_size=None)),
        Case("validation inside of the epoch", _fp16_and(val_check_interval=2)),
        Case("`AdamW(fused=True)`", _fp16, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)),
        Case("`LBFGS`", _options(precision="bf16-mixed"),
             "refused at setup: it evaluates several gradients within one step",
             optimizer=lambda parameters: torch.optim.LBFGS(parameters, lr=1e-3)),
        Case("`torch.compile`", _fp16, base="compiled", where="slow"),
    ],
    "Callbacks": [
        Case("`EMAWeightAveraging`", lambda pl: {**_fp16(pl), **_callback("EMAWeightAveraging")(pl)}),
        Case("`StochasticWeightAveraging`", lambda pl: {
            **_fp16(pl), **_callback("StochasticWeightAveraging", swa_lrs=1e-3, swa_epoch_start=1)(pl)}),
    ],
}  # fmt: skip

SECTIONS = {"guards": CASES, "FractionalCheckpoint": SAVED, "PrecisionFallback": FALLEN_BACK}


def _spike(pl: Any) -> Any:
    return importlib.import_module(f"{pl.__name__}.callbacks.spike").SpikeDetection(warmup=50)


def cases() -> list[Case]:
    """All of them."""
    return [
        replace(case, about=about)
        for about, groups in SECTIONS.items()
        for title, group in groups.items()
        for case in group
    ]


def page() -> str:
    """The page's text."""
    lines = [HEAD.rstrip()]
    shown = {"distributed": "CPU, two processes", "gpu": "a GPU", "slow": "CPU", "": "CPU"}
    for about, groups in SECTIONS.items():
        lines += ["", ABOUT[about].rstrip()]
        for title, group in groups.items():
            lines += ["", f"### {title}", "", "| | answer | tested on |", "|---|---|---|"]
            lines += [f"| {case.name} | {case.answer} | {shown[case.where]} |" for case in group]
    lines += ["", SUITE.rstrip(), "", "| test with another outcome | because it |", "|---|---|"]
    lines += [f"| `{name}` | {reason} |" for name, reason in EXPECTED.items()]
    return "\n".join(lines) + "\n"


def _beyond(layer: nn.Linear, bf16_too: bool) -> Tensor:
    """1 in fp32; infinite where a linear layer computes in fp16, which ends at 65,504, or in bf16, where 257 is 256."""
    one = torch.ones_like(layer.weight[:1, :1])
    large, odd = (nn.functional.linear(one * number, one).float() for number in (65536.0 * 2, 257.0))
    return (large / 65536.0 / 2 / (odd - 256.0 if bf16_too else 1.0)).squeeze()


def make_module(pl: Any, case: Case) -> Any:
    """A module with batch norm and dropout whose third batch has a NaN loss, or one that overflows 16 bits."""

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
            factor: Any = float("nan") if self.seen == BAD_BATCH and not tuning else 1.0
            if case.about == "PrecisionFallback" and batch_idx == BAD_BATCH:
                factor = _beyond(self.net[0], bf16_too="to" not in case.arguments)
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

    if case.base == "fsdp2":
        Module.configure_model = _shard
    return Module()


def _shard(module: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(module.net, mesh=module.device_mesh["data_parallel"])


if __name__ == "__main__":
    PAGE.write_text(page())
