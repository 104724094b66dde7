"""Random short runs of strange modules, batches and loops, each made twice: without the package and with it.

A seed gives the same run every time: `python -m tests.plugin.fuzz 17` prints what it is and what is wrong with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import logging
import os
import random
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin
from torch.utils.data import DataLoader, IterableDataset

from lightning_stability.plugin import CALLBACKS
from tests.plugin.strange import BATCHES, PARTS, WIDTH, Opaque, tensor_of

VARIABLE = "LIGHTNING_STABILITY_CALLBACKS"
STEPS, SCALE = 4, 1024.0

# --- Loops


class Module(pl.LightningModule):
    """A chain of parts."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.parts = nn.Sequential(*(PARTS[name]() for name in case.parts), nn.Linear(WIDTH, 1))
        self.automatic_optimization = case.loop not in MANUAL
        self.own: Any = None

    def value(self, batch: Any) -> Tensor:
        x = tensor_of(batch)
        for part in self.parts:
            x = part(x.to(self.dtype))
        return x.float().pow(2).mean()

    def loss(self, batch: Any) -> Tensor:
        loss = self.value(batch)
        if self.case.logs:
            self.log("loss", loss, on_step=True, on_epoch=True, batch_size=4)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loop = self.case.loop
        if batch_idx == 2 and loop in ENDS:
            ENDS[loop](self.trainer)
        if loop == "returns none" and batch_idx % 2:
            return None
        if not self.automatic_optimization:
            MANUAL[loop](self, batch)
            return None
        loss = self.loss(batch)
        return {"loss": loss, "other": batch, "text": "a"} if loop == "returns a dict" else loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.value(batch), batch_size=4)

    def configure_optimizers(self) -> Any:
        loop = self.case.loop
        if loop in ("no optimizer", "own optimizer"):
            return None
        weights = [p for p in self.parameters() if p.is_floating_point() or p.is_complex()]
        if loop == "two optimizers":
            half = len(weights) // 2
            return [self.case.optimizer(weights[half:]), self.case.optimizer(weights[:half] or weights[half:])]
        optimizer = torch.optim.LBFGS(weights, lr=0.01, max_iter=2) if loop == "LBFGS" else self.case.optimizer(weights)
        if loop != "schedule":
            return optimizer
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": "step"}]


def by_hand(self: Module, batch: Any) -> None:
    optimizer = self.optimizers()
    optimizer.zero_grad()
    self.manual_backward(self.loss(batch))
    optimizer.step()


def plain_backward(self: Module, batch: Any) -> None:
    optimizer = self.optimizers()
    self.loss(batch).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def two_optimizers(self: Module, batch: Any) -> None:
    for optimizer in self.optimizers():
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, 0.5, "norm")
        optimizer.step()
        self.untoggle_optimizer(optimizer)


def with_closure(self: Module, batch: Any) -> None:
    def closure() -> Tensor:
        self.optimizers().zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        return loss

    self.optimizers().step(closure=closure)


def bare_optimizer(self: Module, batch: Any) -> None:
    optimizer = self.optimizers(use_pl_optimizer=False)
    optimizer.zero_grad()
    self.manual_backward(self.loss(batch))
    optimizer.step()


def own_optimizer(self: Module, batch: Any) -> None:
    loss = self.loss(batch)
    self.own = self.own or torch.optim.SGD([p for p in self.parameters() if p.is_floating_point()], 0.01)
    self.own.zero_grad()
    self.manual_backward(loss)
    self.own.step()


def raise_error(trainer: Any) -> None:
    raise ValueError("the user's own")


def raise_stop(trainer: Any) -> None:
    raise StopIteration


def exit_process(trainer: Any) -> None:
    raise SystemExit(3)


def should_stop(trainer: Any) -> None:
    trainer.should_stop = True


MANUAL: dict[str, Callable[[Module, Any], None]] = {
    "by hand": by_hand,
    "plain backward": plain_backward,
    "two optimizers": two_optimizers,
    "closure": with_closure,
    "bare optimizer": bare_optimizer,
    "own optimizer": own_optimizer,
    "no step at all": lambda self, batch: None,
}
ENDS = {"raises": raise_error, "stop iteration": raise_stop, "exits": exit_process, "stops": should_stop}
OPTIONS: dict[str, dict[str, Any]] = {
    "accumulates": {"accumulate_grad_batches": 2},
    "clips by norm": {"gradient_clip_val": 0.1},
    "clips by value": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    "half of the batches": {"limit_train_batches": 0.5},
    "no batches": {"limit_train_batches": 0},
    "overfits": {"overfit_batches": 2},
    "fast dev run": {"fast_dev_run": 2},
    "no epochs": {"max_epochs": 0},
    "two epochs": {"max_epochs": 2, "limit_train_batches": 2},
    "anomaly": {"detect_anomaly": True},
    "warnings are errors": {},
}
AUTOMATIC = ("plain", "iterable", "no optimizer", "returns none", "returns a dict", "LBFGS", "schedule")
LOOPS = (*AUTOMATIC, *MANUAL, *ENDS, *OPTIONS)
PRECISIONS = ("32-true", "32-true", "bf16-mixed", "fp16", "64-true", "bf16-true")
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "SGD": lambda weights: torch.optim.SGD(weights, lr=0.01),
    "momentum": lambda weights: torch.optim.SGD(weights, lr=0.01, momentum=0.9),
    "AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.01),
    "fused AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.01, fused=True),
    "Adagrad": lambda weights: torch.optim.Adagrad(weights, lr=0.01),
    "Rprop": lambda weights: torch.optim.Rprop(weights, lr=0.01),
}


HOOK = re.compile(r"setup|teardown|state_dict|is_needed|wants_\w+|on_(?!predict|test|load)\w+")
"""Where a fault is injected: what is called during `fit`."""


DISABLED = re.compile(r"(\w+ disables itself in this run: \w+(?:Error|Exception)\(.*\)|lightning-stability disables.*)")
"""Of a refusal in words it is said why; of an error of ours its `repr`."""


EXPECTED = re.compile(
    r"Injected\(|uninitialized parameter in <method 'detach'"
    r"|FractionalCheckpoint.*(saves in a row failed.*(Opaque|no aten|invalid python storage|no state)|'no state')"
)
"""What is no error of ours: the injected one, and that no state_dict can be made or saved, of which Lightning's saves
fail too."""


class Stream(IterableDataset):
    """Batches without a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches


# --- A case


@dataclasses.dataclass
class Case:
    """One random run, and the fault that is injected into one of our hooks."""

    seed: int
    parts: list[str]
    batch: str
    loop: str
    precision: str
    optimizer_name: str
    logger: bool
    checkpoints: bool
    validates: bool
    logs: bool
    bad_batch: int | None
    automatic: str
    fault: tuple[str, str, int] | None
    """Class, hook and which of its calls raises."""

    @classmethod
    def of(cls, seed: int, with_fault: bool | None = None) -> Case:
        draw = random.Random(seed)
        fault = draw.random() < 0.5 if with_fault is None else with_fault
        faulty = draw.choice(CALLBACKS)
        hooks = sorted(name for name in dir(faulty) if HOOK.fullmatch(name))
        parts, optimizer = draw.sample(sorted(PARTS), draw.randint(1, 3)), draw.choice(sorted(OPTIMIZERS))
        return cls(
            seed=seed,
            parts=parts,
            batch=draw.choice(sorted(BATCHES)),
            loop=draw.choice(LOOPS),
            precision=draw.choice(PRECISIONS),
            optimizer_name="SGD" if "sparse embedding" in parts else optimizer,
            logger=draw.random() < 0.5,
            checkpoints=draw.random() < 0.3,
            validates=draw.random() < 0.3,
            logs=draw.random() < 0.5,
            bad_batch=draw.choice((None, None, None, None, 1)),
            automatic="all" if fault else draw.choice(("", "all", *(c.__name__ for c in CALLBACKS))),
            fault=(faulty.__name__, draw.choice(hooks), draw.choice((1, 1, 2))) if fault else None,
        )

    def optimizer(self, weights: Any) -> Any:
        return OPTIMIZERS[self.optimizer_name](weights)

    def data(self, stream: bool) -> DataLoader[Any]:
        torch.manual_seed(1)
        batches = []
        for index in range(STEPS + 1):
            x = torch.randn(4, WIDTH)
            if index == self.bad_batch:
                x[1, 2] = torch.nan
            batches.append(BATCHES[self.batch](x))
        return DataLoader(Stream(batches) if stream else batches, batch_size=None, collate_fn=_same)


def _same(batch: Any) -> Any:
    return batch


def digest(value: Any) -> Any:
    """What is equal only for bitwise equal values."""
    if isinstance(value, Tensor):
        if isinstance(value, UninitializedTensorMixin) or value.device.type == "meta":
            return str(type(value))
        if isinstance(value, Opaque):
            value = value.held
        if value.is_nested:
            return [digest(part) for part in value.unbind()]
        if value.layout != torch.strided or value.is_quantized:
            value = value.dequantize() if value.is_quantized else value.to_dense()
        content = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype}{tuple(value.shape)}{hashlib.md5(content).hexdigest()}"
    if isinstance(value, dict):
        return {str(key): digest(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [digest(item) for item in value]
    return str(value)


def train(case: Case, automatic: str, folder: str) -> dict[str, Any]:
    """Run it.

    Args:
        case: The run.
        automatic: Value of the environment variable.
        folder: For what the run writes.

    Returns:
        What came of it, as far as it may not depend on the package.
    """
    os.environ[VARIABLE] = automatic
    for generator in (torch.manual_seed, random.seed, np.random.seed):
        generator(0)
    module, error = Module(case), None
    options: dict[str, Any] = {"max_epochs": 1, "max_steps": STEPS, **OPTIONS.get(case.loop, {})}
    if case.precision == "fp16":
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=SCALE))]
    else:
        options["precision"] = case.precision
    callbacks: list[Any] = [ModelCheckpoint(folder, every_n_train_steps=2)] if case.checkpoints else []
    if case.validates and case.loop in AUTOMATIC:
        callbacks.append(EarlyStopping("val_loss", check_finite=False, patience=9, strict=False))
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        default_root_dir=folder, enable_checkpointing=case.checkpoints, callbacks=callbacks, num_sanity_val_steps=0,
        logger=CSVLogger(folder) if case.logger else False, use_distributed_sampler=False, **options,
    )  # fmt: skip
    loader = case.data(case.loop == "iterable")
    torch.manual_seed(2)
    with contextlib.redirect_stderr(io.StringIO()) as heard:
        try:
            trainer.fit(module, loader, case.data(False) if case.validates else None)
        except BaseException as raised:
            error = raised
    plugin = trainer.strategy.precision_plugin
    scaler = getattr(plugin, "scaler", None)
    said = heard.getvalue()
    state = [p for p in module.parameters() if p.is_floating_point() and not isinstance(p, UninitializedTensorMixin)]
    return {
        "went_bad": not all(p.isfinite().all() for p in state) or (scaler is not None and scaler.get_scale() != SCALE),
        "error": error,
        "disabled": [line for line in DISABLED.findall(said) if not EXPECTED.search(line)],
        "exception": None if error is None else f"{type(error).__name__}: {error}",
        "weights": digest({**dict(module.named_parameters()), **dict(module.named_buffers())}),  # lazy ones too
        "optimizers": digest([optimizer.state_dict().get("state") for optimizer in trainer.strategy._optimizers]),
        "random": digest([torch.get_rng_state(), hash(random.getstate()), int(np.random.get_state()[1].sum())]),
        "step": trainer.global_step,
        "metrics": digest(dict(trainer.callback_metrics)),
        "callbacks": [type(c).__name__ for c in trainer.callbacks if type(c).__name__ != "AutomaticCallbacks"],
        "plugin": [name for name, value in vars(plugin).items() if callable(value) and hasattr(type(plugin), name)],
    }


class Injected(Exception):
    """What the fault in our hook raises."""


@contextlib.contextmanager
def injected(case: Case) -> Iterator[list[str]]:
    """The hook raises at its n-th call; yields a list that is not empty once it has."""
    happened: list[str] = []
    if case.fault is None:
        yield happened
        return
    name, hook, at = case.fault
    cls = next(cls for cls in CALLBACKS if cls.__name__ == name)
    own, original, calls = hook in vars(cls), getattr(cls, hook), []

    def faulty(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(hook)
        if len(calls) == at:
            happened.append(f"{name}.{hook}")
            raise Injected(f"{name}.{hook}")
        return original(self, *args, **kwargs)

    setattr(cls, hook, faulty)
    try:
        yield happened
    finally:
        setattr(cls, hook, original) if own else delattr(cls, hook)


def differences(case: Case) -> list[str]:
    """What is not as it would be without the package, with the traceback of an exception of ours."""
    before, filters = os.environ.get(VARIABLE), "error" if case.loop == "warnings are errors" else "ignore"
    with tempfile.TemporaryDirectory() as folder, _quiet(filters):
        bare = train(case, "none", f"{folder}/bare")
        with injected(case):
            ours = train(case, case.automatic, f"{folder}/ours")
    os.environ.pop(VARIABLE)
    if before is not None:
        os.environ[VARIABLE] = before
    ours_error, _ = ours.pop("error"), bare.pop("error")
    went_bad = bare.pop("went_bad") or case.bad_batch is not None
    ours.pop("went_bad")
    bare.pop("disabled")
    found = [f"failed: {line}" for line in ours.pop("disabled")]
    # where something went bad, the package is there to change the rest
    parts = ["callbacks", "plugin"] if went_bad else list(bare)
    if went_bad and ours["exception"] not in (None, bare["exception"]):
        parts.append("exception")
    found += [f"{part}: {bare[part]!s:.300} became {ours[part]!s:.300}" for part in parts if bare[part] != ours[part]]
    if ours["exception"] != bare["exception"] and ours_error is not None:
        found.append("".join(traceback.format_exception(ours_error)))
    return found


@contextlib.contextmanager
def _quiet(filters: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    # a scripted module keeps the dtype that an earlier case's autocast has compiled into it
    compiles_autocast = torch._C._jit_set_autocast_mode(False)
    with warnings.catch_warnings(), Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        if filters == "error":
            warnings.filterwarnings(
                "error", message="(?s).*(lightning-stability|NaNEarlyStop|GradNorm|InputCheck|Precision)"
            )
        try:
            yield
        finally:
            torch._C._jit_set_autocast_mode(compiles_autocast)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


if __name__ == "__main__":
    first, last = int(sys.argv[1]), int(sys.argv[-1])
    for seed in range(first, last + 1):
        case = Case.of(seed)
        found = differences(case)
        if found or first == last:
            print(case, *found, sep="\n  ", end="\n\n", flush=True)
