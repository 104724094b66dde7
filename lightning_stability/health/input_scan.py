"""One tensor of a batch in as few passes as the device allows, measured and judged on the device."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_stability.health.input_rules import REMEMBERED, WIDTH, Limits, TensorState, judge_with_torch
from lightning_stability.health.kernels import load_kernels

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # float64's squares need torch's way
_WARPS = 4
_DEPTH = 256
"""Tiles that a program adds up in float32 at most."""
_JUDGED = 2048
"""Partial results that a program of the second kernel has in hand at a time."""


def wide(device: torch.device) -> torch.dtype:
    """The dtype of all results: float64, where there is one."""
    return torch.float32 if device.type == "mps" else torch.float64


def scan(values: Tensor, state: TensorState, limits: Limits) -> tuple[Tensor, Tensor]:
    """Measure a tensor, judge it, and bring what is remembered of it up to date.

    `values` are (samples, channels, positions), floating, not empty. Returns a row as `FIELDS` says and (samples, 3) as
    `TensorStats.samples` says.
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
    dtype, each = wide(values.device), (1, 2)  # dimensions of one sample
    least, largest = values.amin(dim=2), values.amax(dim=2)  # on a CPU `aminmax` takes twenty times as long
    peak = torch.maximum(least.abs(), largest.abs()).amax(dim=1).to(dtype)  # nan where one is
    if values.device.type == "cpu" and bool(torch.isfinite(peak).all()):
        counts = torch.full_like(peak, values.shape[1] * values.shape[2])
        scale = torch.where(peak > 0, peak, 1.0)
        # What is divided by its own peak does not overflow. (`var_mean` takes twenty times as long.)
        shares = values / scale.to(values.dtype)[:, None, None]
        about = shares.mean(dim=each, keepdim=True)
        shares -= about
        rest = shares.mean(dim=each).to(dtype)  # what fp32 has rounded off the mean
        squares = torch.square(shares, out=shares).sum(dim=each).to(dtype)
        squares = (squares - counts * rest.square()).clamp(min=0)
        means = about.flatten().to(dtype) + rest
        negative = torch.zeros_like(peak[0])
    else:
        finite = torch.isfinite(values)
        kept = torch.where(finite, values, 0.0).to(dtype)
        counts = finite.sum(dim=each).to(dtype)
        peak = kept.abs().amax(dim=each)
        scale = torch.where(peak > 0, peak, 1.0)
        kept /= scale[:, None, None]
        means = kept.sum(dim=each) / counts.clamp(min=1)
        squares = torch.where(finite, kept - means[:, None, None], 0.0).square().sum(dim=each)
        negative = (values == -math.inf).sum().to(dtype)
    top = peak.max()
    unit = torch.where(top > 0, top, 1.0)
    # From here on in units of the largest magnitude, whose square may be beyond the range.
    means, squares = means * (scale / unit), squares * (scale / unit).square()
    total = counts.sum()
    pivot = means[0]  # so that equal means have a spread of exactly 0
    shift = ((means - pivot) * counts).sum() / total.clamp(min=1)
    mean = torch.where(total > 0, pivot + shift, 0.0)
    spread = (squares + counts * (means - pivot - shift).square()).sum()
    usual_mean = torch.where(state.scale[0] > 0, state.scale[2] / unit, mean)
    distances = squares + counts * (means - usual_mean).square()
    deviations = (distances / counts.clamp(min=1)).sqrt() * unit
    std = (spread / total.clamp(min=1)).sqrt() * unit
    nonfinite = values.shape[1] * values.shape[2] - counts
    samples = torch.stack([peak, nonfinite, deviations], dim=1)
    constant = (least.amin(dim=0) == largest.amax(dim=0)) if limits.watch_channels else None
    row = judge_with_torch(top, std, mean * unit, total, nonfinite.sum(), negative, constant, state, limits)
    return row, samples


# With kernels


def kernels_suit(values: Tensor) -> bool:
    """Whether the kernels take such values: plain ones on an NVIDIA GPU, with Triton."""
    return (
        values.device.type == "cuda"
        and values.dtype in _KERNEL_DTYPES
        and type(values) is Tensor
        and torch.cuda.current_device() == values.get_device()
        and load_kernels("input_kernels") is not None
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
    partials = state.partials
    if partials is None or partials.numel() != 5 * samples * plan.programs:
        partials = torch.empty(5 * samples * plan.programs, dtype=torch.float64, device=device)
        state.partials = partials
    result = torch.empty(WIDTH + REMEMBERED + 3 * samples, dtype=torch.float64, device=device)
    watch = limits.watch_channels
    if watch and state.stamps is None:
        state.stamps = torch.full((channels,), -1, dtype=torch.int32, device=device)
    stamps = state.stamps if watch else partials
    remembered = state.channels if watch else partials
    module = load_kernels("input_kernels")
    module.read_values[(plan.groups, plan.programs)](
        values,
        partials,
        stamps,
        samples,
        channels,
        positions,
        *values.stride(),
        plan.of_piece,
        state.batches,
        WATCH=watch,
        SAMPLES=plan.samples,
        CHANNELS=plan.channels,
        POSITIONS=plan.positions,
        EVEN=plan.even,
        num_warps=_WARPS,
        maxnreg=plan.registers,
    )
    module.judge_values[(1 + plan.judges,)](
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
        int(limits.has_past),
        WATCH=watch,
        PROGRAMS=plan.programs,
        PADDED=plan.padded,
        SAMPLES=plan.judged,
        BLOCK=_JUDGED,
        WIDTH=WIDTH,
        num_warps=8,
    )
    row, state.scale, of_samples = result.split_with_sizes((WIDTH, REMEMBERED, 3 * samples))
    return row, of_samples.view(samples, 3)


@dataclass(slots=True, frozen=True)
class _Size:
    """How much of a tensor a program of the first kernel has in hand.

    Attributes:
        tile: Values, at a time.
        registers: For each of its threads; the fewer, the more programs share a multiprocessor, and one computes while
            others wait for memory.
        programs: The most there are: twice as many as run at once on an H100; with more, each has too little to do.
    """

    tile: int
    registers: int
    programs: int


_LARGE = _Size(tile=2048, registers=128, programs=1056)
_SMALL = _Size(tile=1024, registers=64, programs=2112)


@dataclass(slots=True, frozen=True)
class _Plan:
    """How a tensor is dealt out: tiles of some samples, channels and positions, in pieces, among programs."""

    samples: int  # of a tile
    channels: int  # of a tile
    positions: int  # of a tile
    registers: int  # of a thread
    even: bool  # whether no tile reaches beyond the values
    groups: int  # of samples
    pieces: int  # in which the positions of a channel are cut
    of_piece: int  # tiles in each
    items: int  # groups of channels times pieces
    programs: int  # for each group of samples; each takes every such item
    padded: int  # as many, rounded up to a power of two
    judged: int  # samples that a program judges
    judges: int  # programs that judge samples


@functools.lru_cache(maxsize=256)
def _plan(samples: int, channels: int, positions: int) -> _Plan:
    """Deal a tensor out, in large tiles if they come out even.

    Example:
        >>> plan = _plan(32, 19, 2048)
        >>> (plan.samples, plan.channels, plan.positions), plan.items, plan.programs
        ((1, 1, 2048), 19, 19)
        >>> plan = _plan(256, 3, 224 * 224)
        >>> (plan.samples, plan.channels, plan.positions), plan.items, plan.programs
        ((1, 1, 1024), 21, 7)
    """
    plan = _deal(samples, channels, positions, _LARGE)
    return plan if plan.even else _deal(samples, channels, positions, _SMALL)


def _deal(samples: int, channels: int, positions: int, size: _Size) -> _Plan:
    most_channels = _power_of_two(channels)
    of_positions = min(_power_of_two(positions), size.tile)
    # Smaller tiles where many places of a larger one would be empty and channels can fill it.
    while (
        of_positions > 128 and -positions % of_positions > positions // 8 and most_channels * of_positions > size.tile
    ):
        of_positions //= 2
    of_channels = min(most_channels, size.tile // of_positions)
    of_samples = min(_power_of_two(samples), size.tile // of_positions // of_channels)
    groups, of_group = -(-samples // of_samples), -(-channels // of_channels)
    across = -(-positions // of_positions)
    wanted = max(size.programs // groups, of_group * across // _DEPTH, 1)
    of_piece = -(-across // min(wanted if of_group < wanted else 1, across))
    pieces = -(-across // of_piece)
    items = of_group * pieces
    programs = -(-items // -(-items // wanted))
    padded = _power_of_two(programs)
    judged = max(_JUDGED // 2 // padded, 1)
    return _Plan(
        of_samples,
        of_channels,
        of_positions,
        size.registers,
        channels % of_channels == 0 and positions % of_positions == 0,
        groups,
        pieces,
        of_piece,
        items,
        programs,
        padded,
        judged,
        -(-samples // judged),
    )


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()
