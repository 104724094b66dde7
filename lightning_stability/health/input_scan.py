"""One tensor of a batch in as few passes as the device allows, and the verdict on it, all on the device."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_stability.health.inputs import TensorState

WIDTH = 12  # of a row: `inputs.FIELDS`
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # float64's squares need torch's way
ADOPTED = 8
"""After so many batches in a row of another scale, theirs is the usual."""
_TILE = 2048
"""Values that a program has in hand at a time."""
_PROGRAMS = 2048
"""About as many programs keep a large GPU busy, and leave the second kernel little to add up."""


@dataclass(slots=True, frozen=True)
class Limits:
    """What a tensor is judged by.

    Attributes:
        max_abs: The largest magnitude.
        log_ratio: The largest distance of the logarithm of its deviation from the usual.
        watch_channels: Whether dimension 1 numbers channels that may be constant.
        may_flag_channels: Whether one that is counts; not so in the first batch.
    """

    max_abs: float
    log_ratio: float
    watch_channels: bool
    may_flag_channels: bool


def wide(device: torch.device) -> torch.dtype:
    """The dtype of all results: float64, where there is one."""
    return torch.float32 if device.type == "mps" else torch.float64


def scan(values: Tensor, state: TensorState, limits: Limits) -> tuple[Tensor, Tensor]:
    """Measure a tensor, judge it, and bring what is remembered of it up to date.

    Args:
        values: (samples, channels, positions), floating, not empty.
        state: Written.
        limits: What it is judged by.

    Returns:
        A row as `inputs.FIELDS` says, and (samples, 3) as `inputs.SAMPLE_FIELDS` says.
    """
    if kernels_suit(values):
        result = _scan_with_kernels(values, state, limits)
        if result is not None:
            return result
    return scan_with_torch(values, state, limits)


# With torch


def scan_with_torch(values: Tensor, state: TensorState, limits: Limits) -> tuple[Tensor, Tensor]:
    """As `scan`, wherever torch runs."""
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float()
    dtype = wide(values.device)
    least, largest = values.aminmax(dim=2)
    peak = torch.maximum(least.abs(), largest.abs()).to(dtype)  # nan where one is
    if values.device.type == "cpu" and bool(torch.isfinite(peak).all()):
        counts = torch.full_like(peak, values.shape[2])
        scale = torch.where(peak > 0, peak, 1.0)
        # On the CPU torch adds up in double, and nothing that is divided by its own peak overflows.
        variances, means = torch.var_mean(values / scale.to(values.dtype).unsqueeze(2), dim=2, correction=0)
        means, squares = means.to(dtype), variances.to(dtype) * counts
    else:
        finite = torch.isfinite(values)
        kept = torch.where(finite, values, 0.0).to(dtype)
        counts = finite.sum(dim=2).to(dtype)
        peak = kept.abs().amax(dim=2)
        scale = torch.where(peak > 0, peak, 1.0)
        kept /= scale.unsqueeze(2)
        means = kept.sum(dim=2) / counts.clamp(min=1)
        squares = torch.where(finite, kept - means.unsqueeze(2), 0.0).square().sum(dim=2)
    top = peak.max()
    unit = torch.where(top > 0, top, 1.0)
    # From here on in units of the largest magnitude, whose square may be beyond the range.
    means, squares = means * (scale / unit), squares * (scale / unit).square()
    total = counts.sum()
    pivot = means[0, 0]  # so that equal means have a spread of exactly 0
    shift = ((means - pivot) * counts).sum() / total.clamp(min=1)
    mean = torch.where(total > 0, pivot + shift, 0.0)
    of_samples = counts.sum(dim=1)
    spreads = (squares + counts * (means - pivot - shift).square()).sum(dim=1)
    usual_mean = torch.where(state.scale[0] > 0, state.scale[2] / unit, mean)
    distances = (squares + counts * (means - usual_mean).square()).sum(dim=1)
    deviations = (distances / of_samples.clamp(min=1)).sqrt() * unit
    std = (spreads.sum() / total.clamp(min=1)).sqrt() * unit
    nonfinite = values.shape[1] * values.shape[2] - of_samples
    samples = torch.stack([peak.amax(dim=1), nonfinite, deviations], dim=1)
    constant = (least.amin(dim=0) == largest.amax(dim=0)) if limits.watch_channels else None
    return _judge(top, std, mean * unit, nonfinite.sum(), constant, state, limits), samples


def _judge(
    peak: Tensor, std: Tensor, mean: Tensor, nonfinite: Tensor, constant: Tensor | None, state: TensorState, limits: Any
) -> Tensor:
    count, log_mean, usual_mean, row = state.scale
    zero = torch.zeros_like(peak)
    new, first = zero, zero - 1
    if constant is not None and state.channels is not None:
        fresh = constant & (state.channels == 0)
        new = fresh.sum().to(peak.dtype)
        first = torch.where(new > 0, fresh.to(torch.uint8).argmax().to(peak.dtype), -1.0)
        state.channels = torch.maximum(state.channels, constant.to(torch.int8))
    log_std = torch.log(torch.where(std > 0, std, 1.0))
    is_nonfinite = nonfinite > 0
    is_beyond = peak > limits.max_abs
    is_constant = (new > 0) & limits.may_flag_channels
    is_drifted = (count > 0) & (std > 0) & ((log_std - log_mean).abs() > limits.log_ratio)
    flagged = is_nonfinite | is_beyond | is_constant | is_drifted
    usual = torch.where(count > 0, log_mean.exp(), math.nan)
    counted = count + 1.0
    scale = [counted, log_mean + (log_std - log_mean) / counted, usual_mean + (mean - usual_mean) / counted, zero]
    kept = torch.stack([count, log_mean, usual_mean, row + is_drifted.to(row.dtype)])
    adopted = torch.stack([zero + 1.0, log_std, mean, zero])
    state.scale = torch.where((std > 0) & ~flagged, torch.stack(scale), torch.where(kept[3] < ADOPTED, kept, adopted))
    flags = [flag.to(peak.dtype) for flag in (is_nonfinite, is_beyond, is_constant, is_drifted)]
    return torch.stack([peak, std, mean, nonfinite, usual, *flags, new, first, flagged.to(peak.dtype)])


# With kernels


def kernels_suit(values: Tensor) -> bool:
    """Whether the kernels take such values: plain ones on an NVIDIA GPU, with Triton."""
    return (
        values.device.type == "cuda"
        and values.dtype in _KERNEL_DTYPES
        and type(values) is Tensor
        and torch.cuda.current_device() == values.get_device()
        and kernels() is not None
    )


_REFUSED: list[str] = []  # why the kernels do not run in this process: one entry, or none


def _scan_with_kernels(values: Tensor, state: TensorState, limits: Limits) -> tuple[Tensor, Tensor] | None:
    """As `scan`; None if they cannot be compiled here, which torch's way then makes good."""
    if _REFUSED:
        return None
    try:
        return scan_with_kernels(values, state, limits)
    except Exception as error:  # no compiler, an old driver, an old GPU
        _REFUSED.append(f"{type(error).__name__}: {error}")
        return None


def scan_with_kernels(values: Tensor, state: TensorState, limits: Limits) -> tuple[Tensor, Tensor]:
    """As `scan`, with two kernels: the values are read once, and what comes of it is added up."""
    samples, channels, positions = values.shape
    plan = _plan(samples, channels, positions)
    device = values.device
    partials = torch.empty((4, samples, plan.programs), dtype=torch.float64, device=device)
    result = torch.empty(WIDTH + 3 * samples, dtype=torch.float64, device=device)
    watch = limits.watch_channels
    if watch and state.stamps is None:
        state.stamps = torch.full((channels,), -1, dtype=torch.int32, device=device)
    stamps = state.stamps if watch else partials
    remembered = state.channels if watch else partials
    module = kernels()
    module.read_values[(samples, plan.programs)](
        values,
        partials,
        stamps,
        channels,
        positions,
        *values.stride(),
        plan.pieces,
        plan.piece,
        plan.items,
        state.batches,
        WATCH=watch,
        CHANNELS=plan.tile_channels,
        POSITIONS=plan.tile_positions,
        num_warps=4,
    )
    module.judge_values[(1,)](
        partials,
        stamps,
        remembered,
        state.scale,
        result,
        samples,
        channels,
        channels * positions,
        state.batches,
        limits.max_abs,
        limits.log_ratio,
        WATCH=watch,
        MAY_FLAG=limits.may_flag_channels,
        PROGRAMS=plan.programs,
        PADDED=_power_of_two(plan.programs),
        SAMPLES=max(1024 // _power_of_two(plan.programs), 1),
        WIDTH=WIDTH,
        ADOPTED=ADOPTED,
        num_warps=8,
    )
    return result[:WIDTH], result[WIDTH:].view(samples, 3)


@dataclass(slots=True, frozen=True)
class _Plan:
    """How a sample is dealt out: tiles of some channels and positions, in pieces, among programs."""

    tile_channels: int
    tile_positions: int
    pieces: int  # in which the positions of a channel are cut
    piece: int  # positions in each, a multiple of the tile's
    items: int  # groups of channels times pieces
    programs: int  # for each sample; each takes every such item


@functools.lru_cache(maxsize=256)
def _plan(samples: int, channels: int, positions: int) -> _Plan:
    """Deal a sample out.

    Example:
        >>> _plan(32, 19, 2048)
        _Plan(tile_channels=1, tile_positions=2048, pieces=1, piece=2048, items=19, programs=19)
        >>> _plan(4096, 1000, 1).programs
        1
    """
    tile_positions = min(_power_of_two(positions), _TILE)
    tile_channels = min(_TILE // tile_positions, _power_of_two(channels))
    groups = -(-channels // tile_channels)
    wanted = max(_PROGRAMS // samples, 1)
    tiles = -(-positions // tile_positions)
    pieces = min(max(wanted // groups, 1), tiles)
    piece = -(-tiles // pieces) * tile_positions
    pieces = -(-positions // piece)
    items = groups * pieces
    return _Plan(tile_channels, tile_positions, pieces, piece, items, min(items, wanted))


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


@functools.lru_cache(maxsize=1)
def kernels() -> Any:
    """The module of kernels; None without a Triton that can take them."""
    if torch.version.hip is not None:
        return None
    try:
        from lightning_stability.health import input_kernels
    except Exception:  # not installed, or too old or too new
        return None
    return input_kernels
