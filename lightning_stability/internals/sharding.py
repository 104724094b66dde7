"""Private names of strategies whose ranks write a checkpoint together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_stability.internals.overrides import Overrides
from lightning_stability.internals.resume import dump_checkpoint


def writes_shards(trainer: Any) -> bool:
    """Whether each rank writes what it holds, by torch's distributed checkpoint: FSDP2, unless told otherwise."""
    strategy = trainer.strategy
    ours = any(cls.__name__ == "ModelParallelStrategy" for cls in type(strategy).__mro__)
    return ours and bool(strategy._save_distributed_checkpoint)


def dump_shards(trainer: Any, weights_only: bool) -> dict[str, Any]:
    """`dump_checkpoint` with the tensors where they are: Lightning's own copies them to memory that is not pinned."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    strategy, options, overrides = trainer.strategy, StateDictOptions(), Overrides()

    def of_optimizer(optimizer: Any) -> Any:
        return get_optimizer_state_dict(strategy.model, getattr(optimizer, "_optimizer", optimizer), options=options)

    overrides.set(
        strategy, "lightning_module_state_dict", lambda: get_model_state_dict(strategy.model, options=options)
    )
    overrides.set(strategy, "optimizer_state", of_optimizer)
    try:
        return dump_checkpoint(trainer, weights_only)
    finally:
        overrides.restore()


def with_local_part(sharded: Tensor, local: Tensor) -> Tensor:
    """A sharded tensor (`DTensor`) as it is, with another tensor for this rank's part, on any device.

    `DTensor.from_local` would move the part to the device of the mesh.
    """
    kind: Any = type(sharded)
    names, context = sharded.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = {name: getattr(sharded, name) for name in names}  # in newer versions of torch the mesh is one
    whole: Tensor = kind.__tensor_unflatten__(
        {**inner, "_local_tensor": local}, context, sharded.shape, sharded.stride()
    )
    return whole


def load_all_shards(path: Path) -> dict[str, Any]:
    """A folder of torch's distributed checkpoint with every tensor put together, and Lightning's rest of it.

    It loads the folder's index with pickle: look into it first.
    """
    from lightning_fabric.utilities.load import _load_distributed_checkpoint

    return _load_distributed_checkpoint(path)
