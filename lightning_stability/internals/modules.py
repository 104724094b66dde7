"""Private names of modules, metrics and tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torchmetrics import Metric


def leaves_with_paths(tree: Any) -> list[tuple[str, Any]]:
    """What dicts, lists, tuples and named tuples hold, each with its path, such as `['eeg'][0].x`.

    Of other classes, those that derive from dict or list too, the objects themselves.
    """
    leaves, _ = _pytree.tree_flatten_with_path(tree)
    return [(_pytree.keystr(path), leaf) for path, leaf in leaves]


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same nesting, with the function applied to what `leaves_with_paths` finds."""
    return _pytree.tree_map(function, tree)


def within_compiled(module: nn.Module) -> nn.Module | None:
    """The module that `torch.compile(module)` was given; None of any other module."""
    compiled = isinstance(module, torch._dynamo.OptimizedModule)  # type: ignore[attr-defined]
    return module._orig_mod if compiled else None  # type: ignore[return-value]


def compiles_its_call(module: nn.Module) -> bool:
    """Whether calling a module runs a graph that hooks on it would be compiled into.

    `module.compile()` makes it so, and Lightning's own mark on a module whose steps are compiled as a whole.
    """
    return module._compiled_call_impl is not None or getattr(module, "_compiler_ctx", None) is not None


def has_own_parameters(module: nn.Module) -> bool:
    """Whether a module holds parameters itself, beside those of its children."""
    return any(weight is not None for weight in module._parameters.values())


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """A module's own buffers by name, as it holds them; of a scripted module (which writes in place only) a copy."""
    held = module._buffers
    return held if isinstance(held, dict) else dict(held.items())


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """A module's own parameters by name, as it holds them."""
    return module._parameters


def children_of(module: nn.Module) -> dict[str, Any]:
    """A module's own submodules by name, as it holds them; of a scripted module a copy."""
    held = module._modules
    return held if isinstance(held, dict) else dict(held.items())


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written in place; writes through `.data` are not counted. Inference tensors count none."""
    return 0 if tensor.is_inference() else tensor._version


def has_own_dispatch(tensor: Tensor) -> bool:
    """Whether operations on a tensor run code of its class, as those of a DTensor or a jagged tensor do."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each tensor, by a few launches for all of them."""
    torch._foreach_copy_(targets, sources)  # type: ignore[arg-type]


def norm_of_each(tensors: Sequence[Tensor], order: float, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The norm of each tensor, by a few launches for all of them.

    Args:
        tensors: Of one device and dtype.
        order: 2 for the Euclidean norm.
        dtype: What it is summed up in; None for the tensors' own.
    """
    return list(torch._foreach_norm(list(tensors), order, dtype=dtype))  # type: ignore[no-untyped-call]


def metric_defaults(metric: Metric) -> dict[str, Any]:
    """What the states of a metric are after `reset`, by name; may be written."""
    return metric._defaults


def metric_reductions(metric: Metric) -> dict[str, Any]:
    """How the states of a metric are reduced over ranks, by name."""
    return metric._reductions


def set_update_count(metric: Metric, count: int) -> None:
    """Make a metric take itself for one that was updated so often, and compute anew when it is next asked."""
    metric._update_count = count
    metric._computed = None


def newest_value(metric: Metric) -> Any:
    """What a metric was in the newest batch, which `self.log(on_step=True)` logs."""
    return metric._forward_cache


def set_newest_value(metric: Metric, value: Any) -> None:
    """The reverse of `newest_value`."""
    metric._forward_cache = value


def is_logged_tensor(item: Any) -> bool:
    """Whether an item of `self.log`'s results accumulates a tensor; else its `value` is a torchmetrics Metric."""
    return bool(item.is_tensor)


def logged_in(item: Any) -> str:
    """The hook that an item of `self.log`'s results is logged in."""
    return str(item.meta.fx)


def logged_keys(item: Any) -> set[str]:
    """The keys of an item of `self.log`'s results at the end of an epoch."""
    return {str(item.meta.name), str(item.meta.forked_name(on_step=False))}


def is_logged_by_epoch(item: Any) -> bool:
    """Whether an item of `self.log`'s results is reduced over the epoch."""
    return bool(item.meta.on_epoch)


def is_unlogged(item: Any) -> bool:
    """Whether an item of `self.log`'s results has not been logged since the last epoch's end."""
    return bool(item.has_reset)


def mark_unlogged(item: Any) -> None:
    """Leave an item of `self.log`'s results out of all metrics until it is logged again."""
    item.has_reset = True


def casts_inputs(plugin: Any) -> bool:
    """Whether a precision plugin casts batches to its own dtype."""
    return hasattr(plugin, "_desired_input_dtype")


def names_dtype(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a LightningModule or a metric says that this is its dtype."""
    return vars(module).get("_dtype") is dtype


def set_named_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Make a LightningModule or a metric say that this is its dtype; its tensors stay as they are."""
    module._dtype = dtype  # type: ignore[assignment]
