"""What a Trainer says of itself, and what it is refused for."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer

from lightning_stability._compat import MisconfigurationException, is_instance_by_name, is_overridden
from lightning_stability.health.buckets import CPU_PIECE
from lightning_stability.recovery.guard import decides_on_device

# Strategies whose gradients are not to be had where we look, and what to use in their place.
_HIDDEN = {
    "DeepSpeedStrategy": "its engine keeps and clips the gradients; use DDP or ModelParallelStrategy",
    "XLAStrategy": "its tensors have no multi-tensor norm; leave the callback out",
    "XLAFSDPStrategy": "its tensors have no multi-tensor norm; leave the callback out",
    "SingleDeviceXLAStrategy": "its tensors have no multi-tensor norm; leave the callback out",
}


def log_folder(trainer: Any) -> str | None:
    """The folder of this run's first logger that has one. All ranks have to ask: Lightning broadcasts.

    A logger with a version gets `save_dir/name/version`, which is where Lightning puts its checkpoints.
    """
    folder = None
    for logger in trainer.loggers:
        with contextlib.suppress(Exception):  # one whose server is gone may raise: the next is asked, on all ranks
            folder = _folder_of(logger)
        if folder is not None:
            break
    answer: str | None = trainer.strategy.broadcast(folder)
    return answer


def _folder_of(logger: Any) -> Any:
    folder = getattr(logger, "log_dir", None)
    if folder is None and logger.save_dir is not None and logger.version is not None:
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = "/".join((str(logger.save_dir), str(logger.name), version))
    return folder


def epochs_are_as_long_on_all_ranks(trainer: Any) -> bool:
    """Whether all ranks are known to end an epoch after the same batch, so that they may ask each other there.

    Otherwise one would wait for another that is still training. All ranks have to ask.
    """
    if trainer.world_size == 1:
        return True
    batches = trainer.num_training_batches
    is_same = math.isfinite(batches) and batches == trainer.strategy.broadcast(batches)
    return bool(trainer.strategy.reduce_boolean_decision(is_same, all=True))


def why_gradients_are_hidden(trainer: Any) -> str | None:
    """Why gradients cannot be measured under this Trainer's strategy; None if they can be."""
    strategy = trainer.strategy
    for name, reason in _HIDDEN.items():
        if is_instance_by_name(strategy, name):
            return f"gradients cannot be measured under {type(strategy).__name__}: {reason}."
    if is_instance_by_name(strategy, "FSDPStrategy") and getattr(
        getattr(strategy, "cpu_offload", None), "offload_params", False
    ):
        return "gradients cannot be measured under FSDPStrategy(cpu_offload=True): they are on the CPU; leave it out."
    return None


def refuse_strategy(trainer: Any) -> None:
    """Raise MisconfigurationException under a strategy that hides the gradients."""
    why = why_gradients_are_hidden(trainer)
    if why is not None:
        raise MisconfigurationException(why)


def refuse_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose updates cannot be guarded.

    Args:
        optimizer: The bare torch optimizer.

    Raises:
        MisconfigurationException: If it cannot be told what to skip, or makes non-finite weights by itself.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        raise MisconfigurationException(
            f"{name} cannot be guarded: it evaluates several gradients within one step and keeps each of them. Use"
            " another optimizer, or leave out the callbacks that skip updates."
        )
    for group in optimizer.param_groups:
        eps = group.get("eps")
        half = any(parameter.dtype == torch.float16 for parameter in group["params"])
        if half and isinstance(eps, float) and eps > 0.0 and float(torch.tensor(eps, dtype=torch.float16)) == 0.0:
            raise MisconfigurationException(
                f"{name}(eps={eps:g}) with fp16 weights: eps is 0 in fp16, so the first update divides by zero. Give"
                " eps=1e-4 or larger, or train in 16-mixed, bf16-true or 32-true."
            )


def say_what_it_costs(trainer: Any, optimizer: Optimizer) -> None:
    """One line for an optimizer that cannot be told to skip without a host read."""
    group = next(iter(optimizer.param_groups), None)
    if group is None or group.get("fused"):  # (none: Lightning's stand-in where no optimizer is configured)
        return
    name = type(optimizer).__name__
    has_fused = isinstance(optimizer, (SGD, Adam, AdamW, Adagrad))
    if "foreach" in group:
        on_cpu = any(parameter.device.type == "cpu" for parameter in group["params"])
        foreach = not on_cpu if group["foreach"] is None else group["foreach"]
        name += "(foreach)" if foreach else "(for-loop)"
    # Lightning refuses to clip with a fused optimizer under a GradScaler
    clips = trainer.gradient_clip_val and getattr(trainer.strategy.precision_plugin, "scaler", None) is not None
    removed = "; fused=True removes it" if has_fused and not clips else ""
    rank_zero_info(f"Guarding {name} takes one read of the device per step{removed}.")


def read_lag(trainer: Any, retries: bool) -> int:
    """How many steps the host may be behind: where the device decides alone, it need not wait for it.

    Args:
        retries: Whether bad steps are trained again.
    """
    if trainer.strategy.root_device.type == "cpu":
        return 0
    if trainer.world_size > 1:  # all ranks have to hear of a step after the same number of steps
        return int(not retries and getattr(trainer.precision_plugin, "scaler", None) is None)
    return int(not retries or all(decides_on_device(optimizer) for optimizer in trainer.optimizers))


def clips_by_norm(trainer: Any) -> bool:
    """Whether Lightning itself clips the gradients of this Trainer's module, by their norm."""
    module, plugin_class = trainer.lightning_module, type(trainer.strategy.precision_plugin)
    return bool(
        trainer.gradient_clip_val
        and str(trainer.gradient_clip_algorithm or "norm").lower().endswith("norm")
        and module.automatic_optimization
        and not is_overridden("configure_gradient_clipping", module)
        # a plugin of the user's, or of a strategy that clips in its own way
        and plugin_class.clip_grad_by_norm.__qualname__ == "Precision.clip_grad_by_norm"
        and plugin_class.main_params.__qualname__ == "Precision.main_params"
    )


def is_clipped_to_the_bit(optimizer: Optimizer) -> bool:
    """Whether clipping with our norm gives the bits that Lightning's own gives: one kind of fp32 tensors."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kinds = {(parameter.device, parameter.dtype, type(parameter)) for parameter in parameters}
    in_pieces = any(p.device.type == "cpu" and p.numel() > CPU_PIECE for p in parameters)
    return len(kinds) == 1 and parameters[0].dtype == torch.float32 and not _is_sharded(parameters[0]) and not in_pieces


def _is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, "device_mesh")
