"""Passes that change the batch: its samples, its columns, its scale, its targets."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_stability.diagnosis import changes
from lightning_stability.diagnosis.bench import MOST_ITEMS, Bench
from lightning_stability.diagnosis.trials import Change
from lightning_stability.health.values import named_tensors


def finite_entry(bench: Bench) -> None:
    """The non-finite values of the batch's entry set to 0."""
    entry = bench.origin.tensor if bench.origin is not None else None
    if entry is None:
        return

    def finite(tensor: Tensor) -> Tensor:
        return torch.nan_to_num(tensor, 0.0, 0.0, 0.0) if tensor.is_floating_point() else tensor

    bench.lab.try_(changes.with_entry("batch", entry, finite, f"the non-finite values of `{entry}` set to 0"))


def valid_targets(bench: Bench) -> None:
    """Where a mean is over nothing: each entry of whole numbers, or of zeros, made one that nothing ignores."""
    if not bench.signs.over_nothing:
        return
    for entry, tensor in named_tensors(bench.step.batches[bench.signs.batch]):
        if tensor.is_floating_point() and not bool(tensor.any()):
            bench.lab.try_(changes.with_entry("targets", entry, torch.ones_like, f"`{entry}` of ones throughout"))
        elif tensor.dtype == torch.bool:
            bench.lab.try_(changes.with_entry("targets", entry, torch.ones_like, f"`{entry}` all true"))
        elif not (tensor.is_floating_point() or tensor.is_complex()):
            for number, like in enumerate((torch.zeros_like, torch.ones_like)):
                change = changes.with_entry("targets", entry, like, f"`{entry}` of class {number} throughout")
                if bench.lab.try_(change).finite:
                    break


def bad_samples(bench: Bench) -> None:
    """The smallest set of samples without which the step is finite; others take their place."""
    size, number = bench.signs.batch_size, bench.signs.batch
    known = bench.origin.samples if bench.origin is not None else []
    if not 2 <= size <= MOST_ITEMS:
        return

    def without(samples: list[int]) -> Change:
        return changes.with_other_samples(samples, size, number)

    suspects = _suspects(bench, known)
    whole = bench.lab.try_(without(suspects), keep=False)
    if not whole.finite:
        good = next((index for index in range(size) if index not in set(suspects)), 0)
        suspects = [index for index in range(size) if index != good]
        whole = bench.lab.try_(without(suspects), keep=False)
    if whole.finite:
        bench.keep_smallest(suspects, without, whole)
    else:
        bench.lab.keep(whole)


def _suspects(bench: Bench, known: list[int]) -> list[int]:
    """The samples to begin with: those that the origin names, or those that are far larger than the rest."""
    size = bench.signs.batch_size
    if known and len(known) < size:
        return known
    largest: list[float] = [0.0] * size
    for values in bench.signs.sample_scales.values():
        usual = statistics.median(values) or 1.0
        largest = [max(a, b / usual) for a, b in zip(largest, values, strict=True)]
    far = [index for index, value in enumerate(largest) if value > 4]
    return far if 0 < len(far) < size else list(range(1, size))


def columns_of_samples(bench: Bench) -> None:
    """The smallest set of columns or channels in those samples."""
    found = next((t.facts["samples"] for t in bench.lab.trials if t.name == "samples" and t.finite), None)
    size, number = bench.signs.batch_size, bench.signs.batch
    if not found:
        return
    for entry, tensor in named_tensors(bench.step.batches[number]):
        has_columns = tensor.is_floating_point() and tensor.dim() >= 2 and len(tensor) == size
        if not has_columns or not 2 <= tensor.shape[1] <= MOST_ITEMS:
            continue

        def without(columns: list[int], entry: str = entry) -> Change:
            return changes.with_other_columns(entry, columns, found, size, number)

        every = list(range(tensor.shape[1]))
        whole = bench.lab.try_(without(every), keep=False)
        if whole.finite:
            bench.keep_smallest(every, without, whole)
            return


def unscaled(bench: Bench) -> None:
    """What made the numbers much larger undone."""
    for amplifier in bench.signs.amplifiers[:3]:
        factor = amplifier.factor
        if amplifier.module:
            if bench.lab.try_(changes.with_scaled_output(amplifier.module, factor, amplifier.overflows)).finite:
                return
            continue
        for entry in bench.signs.sample_scales:
            words = f"`{entry}` divided by {factor:,.4g}"
            bench.lab.try_(changes.with_entry("input scale", entry, _divided(factor), words, factor=factor, module=""))


def scaled_entries(bench: Bench) -> None:
    """Each entry of numbers brought to unit deviation, and clipped."""
    for entry, values in bench.signs.sample_scales.items():
        usual = statistics.median(values)
        if usual > 8:
            words = f"`{entry}` divided by {usual:,.4g}, to unit deviation, and clipped at 10"
            change = _divided(usual, limit=10.0)
            bench.lab.try_(changes.with_entry("input scale", entry, change, words, factor=usual, module=None))


def _divided(factor: float, limit: float | None = None) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor / factor if limit is None else (tensor / factor).clamp(-limit, limit)
