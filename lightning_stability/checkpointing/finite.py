"""Which non-finite values in a checkpoint are damage, and which the module put there itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_stability.checkpointing.verification import checked_tensors, own_name
from lightning_stability.health.values import NonfiniteLook, nonfinite_names, stored_floats

_Sort = Callable[[], tuple[list[str], list[str]]]
_PLUS, _MINUS, _NAN = 1, 2, 4


class FiniteCheck:
    """Tells what became non-finite from what was so by design, position by position.

    By design are, each with its sign, in buffers and in parameters that are frozen from the start:

    - what they hold when training starts;
    - what a hook writes into one when an epoch starts, or fills it with when one ends;
    - infinities in one that is made, or gets another shape, while the run trains;
    - -inf among zeros or ones, and any -inf after the first batch: an attention mask;
    - a metric's state before its first update.

    Weights that are trained, the statistics of norm layers and the optimizer's state have to be finite.

    Args:
        module: In `on_train_start`.

    Example:
        >>> module = nn.Linear(1, 1)
        >>> module.register_buffer("best", torch.tensor(torch.inf))
        >>> check = FiniteCheck(module)
        >>> check.unexpected({"state_dict": {"best": torch.tensor(torch.inf), "bias": torch.tensor([torch.inf])}})
        ['bias']
        >>> check.unexpected({"state_dict": {"best": torch.tensor(torch.nan)}})
        ['best']
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._allowed: dict[str, Tensor] = {}
        self._patterns: set[str] = set()
        self._trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        self._shapes = {name: _shape(buffer) for name, buffer in self._buffers().items()}
        for name, codes in _codes_of(self._buffers()).items():
            self._allow(name, codes)

    def allow(self, patterns: Iterable[str]) -> None:
        """Let these be non-finite: names as in `state_dict`, `*` stands for anything."""
        self._patterns.update(patterns)

    def before_hooks(self) -> dict[str, Tensor]:
        """The non-finite positions of the buffers, for `after_hooks`."""
        return _codes_of(self._buffers())

    def after_hooks(self, before: dict[str, Tensor], filled: bool = False) -> None:
        """What has become non-finite since `before_hooks` was written by a hook, not computed by a training step.

        Args:
            before: What that returned.
            filled: Whether only a buffer of one value counts.
        """
        buffers = self._buffers()
        for name, codes in _codes_of(buffers).items():
            was = before.get(name)
            if was is not None and was.shape == codes.shape and torch.equal(was, codes):
                continue
            if not filled or bool((codes == codes.flatten()[0]).all()):
                self._allow(name, codes)

    def after_first_batch(self) -> None:
        """What is -inf in a buffer by now was filled in by the first forward pass."""
        for name, codes in _codes_of(self._buffers()).items():
            if codes.numel() > 1 and not bool((codes & (_PLUS | _NAN)).any()):
                self._allow(name, codes)
        self._note_new_buffers()

    def unexpected(self, checkpoint: dict[str, Any]) -> list[str]:
        """The names of what became non-finite, of a checkpoint as Lightning dumps it."""
        return self.begin(checkpoint)[1]()[0]

    def begin(self, checkpoint: dict[str, Any], hidden: dict[str, Tensor] | None = None) -> tuple[NonfiniteLook, _Sort]:
        """Begin to look at a checkpoint.

        Args:
            checkpoint: As Lightning dumps it.
            hidden: Buffers that its `state_dict` does not have, which have to be finite too.

        Returns:
            The look, and what waits for it and gives two lists of names: what became non-finite, and all that is
            non-finite in the checkpoint. Where the first list is empty, all is so by design.
        """
        tensors, hidden = dict(checked_tensors(checkpoint)), hidden or {}
        both = {**hidden, **tensors}
        look = NonfiniteLook(both.items())

        def sort_out() -> tuple[list[str], list[str]]:
            suspects = {name: both[name] for name in look.names()}
            return self._unexpected(suspects), sorted({own_name(name) for name in suspects if name in tensors})

        return look, sort_out

    def unexpected_now(self) -> list[str]:
        """The same of the module's weights and buffers of now."""
        held = {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}
        return self._unexpected({name: held[name] for name in nonfinite_names(held.items())})

    def state_dict(self) -> dict[str, Tensor]:
        """What may be non-finite later though it is finite now; the rest is seen when a resumed run starts."""
        now = _codes_of(self._buffers())
        return {
            name: codes.cpu()
            for name, codes in self._allowed.items()
            if name in self._shapes and (name not in now or not torch.equal(now[name], codes))
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Add what `state_dict` returned of an earlier run's."""
        for name, codes in state.items():
            self._allow(name, codes)

    def _unexpected(self, suspects: dict[str, Tensor]) -> list[str]:
        buffers, defaults = self._buffers(), _metric_defaults(self._module)
        found = [name for name in suspects if not self._is_by_design(name, suspects[name], buffers, defaults)]
        self._note_new_buffers()
        return found

    def _note_new_buffers(self) -> None:
        """A buffer is new once: what it becomes after this is training's work."""
        buffers = self._buffers()
        new = {name: buffer for name, buffer in buffers.items() if self._shapes.get(name) != _shape(buffer)}
        self._shapes.update((name, _shape(buffer)) for name, buffer in new.items())
        for name, codes in _codes_of(new).items():
            if not bool((codes & _NAN).any()):
                self._allow(name, codes)

    def _is_by_design(self, name: str, tensor: Tensor, buffers: dict[str, Tensor], defaults: dict[str, Tensor]) -> bool:
        name = own_name(name)
        if any(fnmatchcase(name, pattern) for pattern in self._patterns):
            return True
        codes = _codes(tensor)
        for allowed in (self._allowed.get(name), _codes(defaults[name]) if name in defaults else None):
            if allowed is not None and allowed.shape == codes.shape and _covers(allowed, codes):
                return True
        if name not in buffers or bool((codes & _NAN).any()):
            return False
        values = stored_floats(tensor)
        if values is None or self._shapes.get(name) != _shape(tensor):
            return True
        rest = values[codes == 0]
        return rest.numel() > 0 and not bool((codes & _PLUS).any()) and bool(((rest == 0) | (rest == 1)).all())

    def _allow(self, name: str, codes: Tensor) -> None:
        before = self._allowed.get(name)
        if before is not None and before.shape == codes.shape:
            codes = codes | before.to(codes.device)
        self._allowed[name] = codes

    def _buffers(self) -> dict[str, Tensor]:
        """The module's buffers, without those that only training computes, and parameters that were never trained."""
        norms = {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in self._module.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            for name in ("running_mean", "running_var")
        }
        frozen = {
            name: parameter
            for name, parameter in self._module.named_parameters()
            if not parameter.requires_grad and name not in self._trained
        }
        return {**frozen, **{name: buffer for name, buffer in self._module.named_buffers() if name not in norms}}


def _shape(buffer: Tensor) -> torch.Size | None:
    """None until a lazy module has made its buffer, and for a nested tensor, which has none."""
    return None if is_lazy(buffer) or buffer.is_nested else buffer.shape


def _covers(allowed: Tensor, codes: Tensor) -> bool:
    return not bool((codes & ~allowed.to(codes.device)).any())


def _codes_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: _codes(tensors[name]) for name in nonfinite_names(tensors.items())}


@torch.no_grad()
def _codes(tensor: Tensor) -> Tensor:
    """Which kind of non-finite value stands where."""
    values = stored_floats(tensor)
    if values is None:
        return torch.zeros(0, dtype=torch.uint8)
    codes = torch.isposinf(values) * _PLUS + torch.isneginf(values) * _MINUS + torch.isnan(values) * _NAN
    return codes.to(torch.uint8)


def _metric_defaults(module: nn.Module) -> dict[str, Tensor]:
    return {
        f"{prefix}.{name}" if prefix else name: default
        for prefix, metric in module.named_modules()
        if isinstance(metric, Metric)
        for name, default in metric._defaults.items()
        if isinstance(default, Tensor)
    }
