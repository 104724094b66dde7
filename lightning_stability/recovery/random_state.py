"""The random state of one process: Python's, numpy's and torch's generators, and those that objects keep themselves."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_stability.internals import numpy_memory


@dataclass(slots=True)
class RandomState:
    """The state of every global generator.

    Capturing and restoring cost microseconds. `state_dict` turns the state into what loads with `weights_only=True`.

    Example:
        >>> state = RandomState.capture()
        >>> first = random.random(), np.random.rand(), torch.rand(()).item()
        >>> state.restore()
        >>> first == (random.random(), np.random.rand(), torch.rand(()).item())
        True
        >>> RandomState.from_state_dict(state.state_dict()).restore()
        >>> first == (random.random(), np.random.rand(), torch.rand(()).item())
        True
    """

    python: Any
    numpy: Any
    cpu: Tensor
    cuda: dict[int, Tensor] = field(default_factory=dict)
    """By device index."""
    mps: Tensor | None = None

    @classmethod
    def capture(cls, device: torch.device | None = None) -> RandomState:
        """Return the state of now.

        Args:
            device: The only device whose generator is wanted besides the CPU's; by default all devices.
        """
        state = cls(random.getstate(), _numpy_state(), torch.get_rng_state())
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            if device is None:
                state.cuda = dict(enumerate(torch.cuda.get_rng_state_all()))
            elif device.type == "cuda":
                index = torch.cuda.current_device() if device.index is None else device.index
                state.cuda = {index: torch.cuda.get_rng_state(index)}
        if torch.backends.mps.is_available() and (device is None or device.type == "mps"):
            state.mps = torch.mps.get_rng_state()
        return state

    def restore(self, devices: bool = True) -> None:
        """Set the generators to this state.

        Args:
            devices: Whether to set those of GPUs too.
        """
        random.setstate(self.python)
        if self.numpy is not None:
            np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if not devices:
            return
        for index, state in self.cuda.items():
            if index < torch.cuda.device_count():
                torch.cuda.set_rng_state(state, index)
        if self.mps is not None and torch.backends.mps.is_available():
            torch.mps.set_rng_state(self.mps)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors, which load with `weights_only=True`."""
        version, words, gauss = self.python
        state: dict[str, Any] = {
            "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
            "torch": self.cpu,
        }
        if self.numpy is not None and self.numpy["bit_generator"] == "MT19937":
            state["numpy"] = {
                "key": torch.from_numpy(self.numpy["state"]["key"].astype(np.int64)),
                "pos": int(self.numpy["state"]["pos"]),
                "has_gauss": int(self.numpy["has_gauss"]),
                "gauss": float(self.numpy["gauss"]),
            }
        if self.cuda:
            state["cuda"] = [self.cuda[index] for index in sorted(self.cuda)]
        if self.mps is not None:
            state["mps"] = self.mps
        return state

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RandomState:
        """The inverse of `state_dict`, also of one that was loaded onto another device."""
        python, numpy = state["python"], state.get("numpy")
        if numpy is not None:
            key = numpy["key"].cpu().numpy().astype(np.uint32)
            numpy = {
                "bit_generator": "MT19937",
                "state": {"key": key, "pos": numpy["pos"]},
                "has_gauss": numpy["has_gauss"],
                "gauss": numpy["gauss"],
            }
        return cls(
            python=(python["version"], tuple(python["words"].tolist()), python["gauss"]),
            numpy=numpy,
            cpu=state["torch"].cpu(),
            cuda={index: device_state.cpu() for index, device_state in enumerate(state.get("cuda", ()))},
            mps=state["mps"].cpu() if "mps" in state else None,
        )


_newest_of_numpy: tuple[bytes, dict[str, Any]] | None = None


def _numpy_state() -> Any:
    """The state of numpy's global generator: the one that was returned before, if it has made no number since.

    Nobody may write into it.
    """
    global _newest_of_numpy
    memory = numpy_memory()
    if memory is None:
        return np.random.get_state(legacy=False)
    known = _newest_of_numpy
    # (normal numbers come in pairs, and the second one is not in that memory)
    if known is not None and known[0] == memory and not known[1]["has_gauss"]:
        return known[1]
    state: dict[str, Any] = np.random.get_state(legacy=False)  # type: ignore[assignment]
    _newest_of_numpy = memory, state
    return state


GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)
"""What an object of the user's can keep as a generator of its own."""


def generator_state(generator: Any) -> Any:
    """Return the state of one generator of `GENERATORS`, as what loads with `weights_only=True`.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> state = generator_state(generator)
        >>> first = generator.random()
        >>> set_generator_state(generator, state)
        >>> first == generator.random()
        True
    """
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return json.dumps(generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return json.dumps(generator.get_state(legacy=False), default=_plain)
    bits = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
    return json.dumps(bits.state, default=_plain)


def set_generator_state(generator: Any, state: Any) -> None:
    """Set a generator to a state that `generator_state` returned of one of its kind.

    Raises:
        ValueError: If it is another kind of generator.
    """
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
        return
    plain = json.loads(state)
    if isinstance(generator, random.Random):
        version, words, gauss = plain
        generator.setstate((version, tuple(words), gauss))
        return
    plain = _arrays(plain)
    if isinstance(generator, np.random.RandomState):
        generator.set_state(plain)
        return
    bits = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
    bits.state = plain


def _plain(value: Any) -> Any:
    return {"array": value.tolist(), "dtype": str(value.dtype)} if isinstance(value, np.ndarray) else value.item()


def _arrays(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"array", "dtype"}:
            return np.array(value["array"], dtype=value["dtype"])
        return {key: _arrays(item) for key, item in value.items()}
    return value
