"""Attention with one thing changed, wherever it is computed: by the user's code, by torch's modules, in one kernel."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_stability.diagnosis.replay import Replay
from lightning_stability.diagnosis.trials import Change

_SOFTMAXES = {torch.softmax, torch.log_softmax, torch.logsumexp, F.softmax, F.log_softmax}
_SOFTMAXES |= {Tensor.softmax, Tensor.log_softmax, Tensor.logsumexp}


class _FreeKey(TorchFunctionMode):
    """No row of scores is -inf throughout: those that are become 0."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _SOFTMAXES and args:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            args = (_freed(args[0], dim if isinstance(dim, int) else -1), *args[1:])
        elif func is F.scaled_dot_product_attention:
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            if mask is not None:
                kwargs["attn_mask"] = _freed(mask, -1)
                args = args[:3] + args[4:]
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
        with _FreeKey():
            yield

    return Change("mask", "rows whose keys are all masked left unmasked", around=around)


def with_plain_attention() -> Change:
    """Attention as separate operations instead of one fused kernel."""

    @contextlib.contextmanager
    def around(replay: Replay) -> Iterator[None]:
        with sdpa_kernel(SDPBackend.MATH):
            yield

    return Change("plain attention", "attention as separate operations", around=around)
