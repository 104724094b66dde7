"""Changing the precision of a running fit."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_stability.internals import casts_inputs, metric_defaults, names_dtype, set_named_dtype

Higher = Literal["32-true", "bf16-mixed"]

BITS = {"16-mixed": 16, "16-true": 16, "bf16-mixed": 16, "bf16-true": 16, "32-true": 32, "64-true": 64}


def make_plugin(trainer: Any, precision: Higher) -> Any:
    """A precision plugin of the Trainer's own namespace."""
    plugins = importlib.import_module(f"{namespace_of(trainer)}.plugins.precision")
    if precision == "32-true":
        return plugins.Precision()
    return plugins.MixedPrecision("bf16-mixed", trainer.strategy.root_device.type)


def go_on_in(fallen_from: str, trainer: Any, checkpoint: dict[str, Any]) -> None:
    """Make a module whose checkpoint has just been loaded what it was in the run that had changed its precision.

    In 16-true Lightning rounds all of a module at the start; what no checkpoint holds (buffers that are not
    persistent, frozen weights that are left out) stayed rounded after the change. And a Trainer whose flag says 16-true
    may have made fp16 tensors already, which the checkpoint's fp32 values were rounded into.

    Args:
        fallen_from: What it had started in.
        trainer: The Trainer, before its strategy sets the module up.
    """
    module = trainer.lightning_module
    if fallen_from == "16-true":
        module.half()
    elif not casts_inputs(trainer.precision_plugin):
        return
    module.float()
    # Lightning's WeightAveraging saves the weights themselves under another name
    weights = checkpoint.get("current_model_state", checkpoint["state_dict"])
    module.load_state_dict(weights, strict=module.strict_loading)


def namespace_of(trainer: Any) -> str:
    """The package that a Trainer comes from, `pytorch_lightning` or `lightning.pytorch`."""
    module: str = next(c.__module__ for c in type(trainer).__mro__ if c.__name__ == "Trainer")
    return module.split(".trainer")[0]


class WiderWeights:
    """fp16 weights, and whatever stands beside them, made fp32; and back, as long as nothing was trained.

    Parameters stay the same objects, so that optimizers, schedulers and hooks keep them.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._tensors: list[Tensor] = []
        self._states: list[tuple[Any, str]] = []
        self._owners: list[Any] = []
        self._metrics: list[tuple[Metric, str]] = []

    def widen(self) -> None:
        """From fp16 to fp32: weights, buffers, metrics, optimizer states, modules that callbacks keep (averages)."""
        self._tensors, self._states, self._owners, self._metrics = [], [], [], []
        for module in self._modules():
            for tensor in [*module.parameters(), *module.buffers()]:
                if tensor.dtype == torch.float16:
                    tensor.data = tensor.data.float()
                    tensor.grad = None
                    self._tensors.append(tensor)
            self._metrics += [
                (metric, name)
                for metric in module.modules()
                if isinstance(metric, Metric)
                for name, default in metric_defaults(metric).items()
                if isinstance(default, Tensor) and default.dtype == torch.float16
            ]
            # what `dtype` says in Lightning's modules and in metrics
            self._owners += [m for m in module.modules() if names_dtype(m, torch.float16)]
        for owner in self._owners:
            set_named_dtype(owner, torch.float32)
        self._convert_metrics(torch.float32)
        for optimizer in self._trainer.optimizers:
            for state in optimizer.state.values():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.dtype == torch.float16:
                        state[name] = value.float()
                        self._states.append((state, name))

    def narrow(self) -> None:
        """Back: exact, since every value came from fp16."""
        for tensor in self._tensors:
            tensor.data = tensor.data.half()
            tensor.grad = None
        for owner in self._owners:
            set_named_dtype(owner, torch.float16)
        self._convert_metrics(torch.float16)
        for state, name in self._states:
            state[name] = state[name].half()

    def _convert_metrics(self, dtype: torch.dtype) -> None:
        for metric, name in self._metrics:
            metric_defaults(metric)[name] = metric_defaults(metric)[name].to(dtype)
            setattr(metric, name, getattr(metric, name).to(dtype))

    def _modules(self) -> Iterator[nn.Module]:
        yield self._trainer.lightning_module
        for callback in self._trainer.callbacks:
            for value in vars(callback).values():
                if isinstance(value, nn.Module) and value is not self._trainer.lightning_module:
                    yield value


def extra_memory(trainer: Any, to: Higher) -> float:
    """About how many bytes a higher precision needs more than the 16-bit one that is being trained in.

    With 16-bit weights, weights, gradients and optimizer states double; in fp32, so do activations, which are what a
    step took beside what is left after it.

    Args:
        trainer: A Trainer on a CUDA device, after its second step, in whose forward pass all of these were held.
    """
    device = trainer.strategy.root_device
    held = list(trainer.lightning_module.parameters())
    held += [p.grad for p in held if p.grad is not None]
    held += [v for o in trainer.optimizers for s in o.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    halves = sum(t.numel() * 2 for t in held if t.dtype == torch.float16 and t.device == device)
    activations = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    return float(halves + (activations if to == "32-true" else 0))


def free_memory(device: torch.device) -> float:
    """Bytes of a CUDA device that were free when torch held most of it."""
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device))
