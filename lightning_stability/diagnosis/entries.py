"""A batch with one thing changed in it; the batch that was recorded stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_stability.diagnosis.step import RecordedStep
from lightning_stability.health.values import named_tensors

Change = Callable[[str, Tensor], Tensor]


def with_entries(step: RecordedStep, change: Change, number: int | None = None) -> RecordedStep:
    """The step with other tensors in its batches.

    Args:
        change: Given an entry's name, such as `batch[0]`, and the tensor; returns the tensor that takes its place.
        number: Of the window's batch; all by default.
    """

    def of(batch: Any) -> Any:
        names = {id(tensor): name for name, tensor in named_tensors(batch)}
        return apply_to_collection(batch, Tensor, lambda t: change(names.get(id(t), ""), t))

    batches = [of(batch) if number in (None, index) else batch for index, batch in enumerate(step.batches)]
    return replace(step, batches=batches)


def batch_size(batch: Any) -> int:
    """The length of the first tensor that has one; 0 if none has.

    Args:
        batch: As `training_step` gets it.
    """
    return next((len(tensor) for _, tensor in named_tensors(batch) if tensor.dim()), 0)


def replaced_samples(samples: list[int], size: int, names: set[str] | None = None) -> Change:
    """Put other samples of the batch in the place of some, so that no shape changes.

    Args:
        samples: Those to replace; not all of the batch.
        names: The entries in which that is done; all by default.
    """
    others = [index for index in range(size) if index not in set(samples)]

    def change(name: str, tensor: Tensor) -> Tensor:
        if not tensor.dim() or len(tensor) != size or (names is not None and name not in names):
            return tensor
        changed = tensor.clone()
        for number, sample in enumerate(samples):
            changed[sample] = tensor[others[(sample + number) % len(others)]]
        return changed

    return change


def replaced_columns(entry: str, columns: list[int], samples: list[int], size: int) -> Change:
    """Put those of another sample in the place of some columns or channels of some samples.

    Args:
        columns: Positions in the second dimension.
        samples: Positions in the batch; not all of it.
    """
    good = replaced_samples(samples, size, {entry})

    def change(name: str, tensor: Tensor) -> Tensor:
        if name != entry:
            return tensor
        changed, whole = tensor.clone(), good(name, tensor)
        changed[:, columns] = whole[:, columns]
        return changed

    return change


@torch.no_grad()
def scales(batch: Any) -> dict[str, list[float]]:
    """How large each sample's values are, by entry: the root of the mean square of its finite values.

    Entries of whole numbers have none, nor have those that are not one row a sample.

    Args:
        batch: As `training_step` gets it.
    """
    size, found = batch_size(batch), {}
    for name, tensor in named_tensors(batch):
        if tensor.is_floating_point() and tensor.dim() and len(tensor) == size:
            rows = tensor.detach().double().reshape(size, -1)
            rows = torch.where(rows.isfinite(), rows, 0.0)
            found[name] = rows.pow(2).mean(dim=1).sqrt().tolist()
    return found
