"""Changing the precision of a running fit."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

Higher = Literal["32-true", "bf16-mixed"]

BITS = {"16-mixed": 16, "16-true": 16, "bf16-mixed": 16, "bf16-true": 16, "32-true": 32, "64-true": 64}


def make_plugin(trainer: Any, precision: Higher) -> Any:
    """A precision plugin of the Trainer's own namespace.

    Args:
        trainer: A Trainer of either namespace.
        precision: What it shall train in.
    """
    plugins = importlib.import_module(f"{namespace_of(trainer)}.plugins.precision")
    if precision == "32-true":
        return plugins.Precision()
    return plugins.MixedPrecision("bf16-mixed", trainer.strategy.root_device.type)


def namespace_of(trainer: Any) -> str:
    """The package that a Trainer comes from, `pytorch_lightning` or `lightning.pytorch`.

    Args:
        trainer: A Trainer of either namespace.
    """
    module: str = next(c.__module__ for c in type(trainer).__mro__ if c.__name__ == "Trainer")
    return module.split(".trainer")[0]


class WiderWeights:
    """fp16 weights, and whatever stands beside them, made fp32; and back, as long as nothing was trained.

    Parameters stay the same objects, so that optimizers, schedulers and hooks keep them.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._tensors: list[Tensor] = []
        self._states: list[tuple[Any, str]] = []

    def widen(self) -> None:
        """From fp16 to fp32: weights, buffers, optimizer states, and modules that callbacks keep (averages)."""
        self._tensors, self._states = [], []
        for module in self._modules():
            for tensor in [*module.parameters(), *module.buffers()]:
                if tensor.dtype == torch.float16:
                    tensor.data = tensor.data.float()
                    tensor.grad = None
                    self._tensors.append(tensor)
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
        for state, name in self._states:
            state[name] = state[name].half()

    def _modules(self) -> Iterator[nn.Module]:
        yield self._trainer.lightning_module
        for callback in self._trainer.callbacks:
            for value in vars(callback).values():
                if isinstance(value, nn.Module) and value is not self._trainer.lightning_module:
                    yield value
