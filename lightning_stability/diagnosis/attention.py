"""Attention with one thing changed, wherever it is computed: by the user's code, by torch's modules, in one kernel."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_stability.diagnosis.replay import Replay
from lightning_stability.diagnosis.trials import Change

_SOFTMAXES = {"aten::_softmax", "aten::_log_softmax", "aten::logsumexp"}


class _FreeKey(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """No row of scores is -inf throughout: those that are become 0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, dict(kwargs or {})
        if name in _SOFTMAXES:
            dim = args[1] if isinstance(args[1], int) else args[1][0]
            args = (_freed(args[0], dim), *args[1:])
        elif name.startswith("aten::_scaled_dot_product") and "backward" not in name:
            places = {argument.name: place for place, argument in enumerate(func._schema.arguments)}
            for bias in ("attn_mask", "attn_bias"):
                place = places.get(bias, len(args))
                if place < len(args):
                    args = (*args[:place], _freed(args[place], -1), *args[place + 1 :])
                elif bias in kwargs:
                    kwargs[bias] = _freed(kwargs[bias], -1)
        return func(*args, **kwargs)


def _freed(scores: Any, dim: int) -> Any:
    if not isinstance(scores, Tensor):
        return scores
    if scores.dtype == torch.bool:
        return scores | ~scores.any(dim=dim, keepdim=True)
    return scores.masked_fill((scores == -math.inf).all(dim=dim, keepdim=True), 0.0)


def with_free_key() -> Change:
    """A row of attention scores whose keys are all masked attends to all of them."""

    @contextlib.contextmanager
    def around(replay: Replay) -> Iterator[None]:
        with _FreeKey():  # type: ignore[no-untyped-call]
            yield

    return Change("mask", "rows whose keys are all masked left unmasked", around=around)


def with_plain_attention() -> Change:
    """Attention as separate operations instead of one fused kernel."""

    @contextlib.contextmanager
    def around(replay: Replay) -> Iterator[None]:
        with sdpa_kernel(SDPBackend.MATH):
            yield

    return Change("plain attention", "attention as separate operations", around=around)
