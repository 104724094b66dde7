"""Small real runs whose gradients are copied by hand, for tests that compare a callback with those copies."""

import importlib
import tempfile
import types
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stability.callbacks.base import StabilityCallback
from lightning_stability.events import read_events
from lightning_stability.health import StepRecord
from lightning_stability.runtime import session_of

FOLDER = tempfile.TemporaryDirectory()  # for what a Trainer writes when nobody told it where
NAMESPACES = ("pytorch_lightning", "lightning.pytorch")


def load_namespace(name: str) -> types.ModuleType:
    module = importlib.import_module(name)
    importlib.import_module(f"{name}.loggers")
    importlib.import_module(f"{name}.plugins.precision")
    return module


def memory_logger(pl: types.ModuleType) -> Any:
    """A logger of the given namespace that keeps what it is given."""

    class MemoryLogger(pl.loggers.Logger):
        def __init__(self) -> None:
            super().__init__()
            self.rows: list[tuple[int, dict[str, float]]] = []

        name = "memory"
        version = "0"

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.rows.append((step, {k: v for k, v in metrics.items() if k != "epoch"}))

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

    return MemoryLogger()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.encoder(x)))


def make_module(pl: types.ModuleType, net: nn.Module | None = None, optimizer: Any = None, **overrides: Any) -> Any:
    """A LightningModule around `net` that copies its true gradients before every optimizer step.

    Args:
        pl: The namespace.
        net: What to train.
        optimizer: Makes the optimizer from the module; AdamW by default.
        overrides: Methods that replace the module's own.
    """

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = Net() if net is None else net
            self.copies: list[dict[str, Tensor]] = []
            self.copied_optimizers: list[int] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[0]).float().pow(2).mean()

        def configure_optimizers(self) -> Any:
            return optimizer(self) if optimizer else torch.optim.AdamW(self.parameters(), lr=1e-3)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            copy_gradients(self, optimizer)

    for name, method in overrides.items():
        setattr(Module, name, method)
    return Module()


def copy_gradients(module: Any, optimizer: Any) -> None:
    scaler = getattr(module.trainer.precision_plugin, "scaler", None)
    scale = scaler.get_scale() if scaler and getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    copies = {}
    for name, parameter in module.named_parameters():
        if id(parameter) in held and parameter.grad is not None:
            grad = parameter.grad.detach().clone()
            grad = grad.to_dense() if grad.is_sparse else grad
            wide = torch.complex128 if grad.is_complex() else torch.float64
            copies[name] = grad.to(wide) / scale
    module.copies.append(copies)
    module.copied_optimizers.append([id(o) for o in module.trainer.optimizers].index(id(optimizer)))


def reference_norms(copies: dict[str, Tensor], depth: int) -> dict[str, float]:
    """Total and group norms of copied gradients in float64, written apart from the package's own."""
    squares: dict[str, float] = {"total": 0.0}
    for name, grad in copies.items():
        square = float((grad.abs() ** 2).sum())
        path = [part for part in name.split(".")[:-1] if part != "_orig_mod"] or [name]
        group = ".".join(path[:depth])
        squares[group] = squares.get(group, 0.0) + square
        squares["total"] += square
    return {name: square**0.5 for name, square in squares.items()}


def data(count: int = 8, batch_size: int = 2, features: int = 6, dtype: torch.dtype = torch.float32) -> DataLoader:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(count, features).to(dtype)), batch_size=batch_size)


class RecordCallback(StabilityCallback):
    """A policy that keeps every record."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.seen_runtimes: list[Any] = []

    def on_record(self, record: StepRecord) -> None:
        self.records.append(record)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen_runtimes.append(session_of(trainer))


def trainer(pl: types.ModuleType, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "default_root_dir": FOLDER.name,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pl.Trainer(**{**defaults, **options})


def incidents(folder: Any) -> list[dict[str, Any]]:
    """A run's events but for its start, its progress and its end."""
    others = ("training_started", "progress", "training_ended")
    return [event for event in read_events(folder) if event["event"] not in others]


def fp16(pl: types.ModuleType, device: str = "cpu", **options: Any) -> list[Any]:
    """Real fp16 with a real GradScaler; on a CPU `precision="16-mixed"` would become bf16."""
    scaler = torch.amp.GradScaler(device, **options)
    return [pl.plugins.precision.MixedPrecision("16-mixed", device, scaler)]
