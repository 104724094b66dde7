"""Triton kernels that read a tensor of a batch once and judge it."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (Triton reads a kernel's annotations itself.)

from types import FunctionType

import triton
import triton.language as tl

from lightning_stability.health import input_rules

# the rules' one source, with Triton's operations in the place of torch's
_globals = {"ops": tl, "ADOPTED": tl.constexpr(input_rules.ADOPTED), "__name__": __name__}
judge = triton.jit(FunctionType(input_rules.judge.__code__, _globals))


@triton.jit(do_not_specialize=["samples", "of_piece", "stamp"])
def read_values(
    values,
    partials,
    stamps,
    samples,
    channels,
    positions,
    sample_stride,
    channel_stride,
    position_stride,
    of_piece,
    stamp,
    WATCH: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """One program's share of some samples: of each the largest magnitude, how many are finite, their mean and squares.

    Sums run in float32, of differences from one of the values; where that is not exact enough, once more in float64.
    If it is `EVEN` no tile reaches beyond the values. A channel that varies gets this batch's stamp: whoever sees it
    writes the same number.
    """
    program = tl.program_id(1)
    programs = tl.num_programs(1)
    # What is beyond the last sample reads that again, and writes the same.
    sample = tl.minimum(tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES), samples - 1)
    of_sample = values + sample.to(tl.int64) * sample_stride
    across = tl.cdiv(positions, POSITIONS)
    pieces = tl.cdiv(across, of_piece)
    items = tl.cdiv(channels, CHANNELS) * pieces
    own_channel = (program // pieces) * CHANNELS
    own_position = (program % pieces) * of_piece * POSITIONS
    own = own_channel.to(tl.int64) * channel_stride + own_position.to(tl.int64) * position_stride
    first = tl.load(of_sample + own)[:, None, None]
    pivot = first.to(tl.float32)
    sums = tl.zeros((SAMPLES, CHANNELS, POSITIONS), tl.float32)
    squares = tl.zeros((SAMPLES, CHANNELS, POSITIONS), tl.float32)
    least = sums + pivot
    largest = least
    count = tl.zeros((), tl.int32)
    for item in range(program, items, programs):
        channel = (item // pieces) * CHANNELS + tl.arange(0, CHANNELS)
        start = (item % pieces) * of_piece
        end = tl.minimum(start + of_piece, across)
        if WATCH:
            varies = tl.zeros((SAMPLES, CHANNELS, POSITIONS), tl.int32)
            reference = tl.load(values + channel.to(tl.int64) * channel_stride, mask=channel < channels, other=0.0)
            reference = reference[None, :, None]
            is_stale = tl.load(stamps + channel, mask=channel < channels, other=stamp) != stamp
        for tile in range(start, end):
            # (told that there is but one, the loads across channels are wide)
            position = (tile * POSITIONS if POSITIONS > 1 else 0) + tl.arange(0, POSITIONS)
            place, inside = places(channel, position, channels, positions, channel_stride, position_stride)
            if EVEN:
                stored = tl.load(of_sample[:, None, None] + place)
            else:  # what is outside is as the pivot is, and changes nothing
                stored = tl.load(of_sample[:, None, None] + place, mask=inside, other=first)
            value = stored.to(tl.float32)
            distance = value - pivot
            sums += distance
            squares += distance * distance
            least = tl.minimum(least, value)
            largest = tl.maximum(largest, value)
            if WATCH:
                varies |= ((stored != reference) & (EVEN | inside)).to(tl.int32)
        count += tl.minimum(channels - (item // pieces) * CHANNELS, CHANNELS) * (
            tl.minimum(end * POSITIONS, positions) - start * POSITIONS
        )
        if WATCH:
            marked = (tl.max(varies, axis=2) > 0) & is_stale[None, :]
            where = tl.broadcast_to((stamps + channel)[None, :], (SAMPLES, CHANNELS))
            tl.store(where, tl.zeros((SAMPLES, CHANNELS), tl.int32) + stamp, mask=marked)

    least = tl.min(tl.min(least, axis=2), axis=1)
    largest = tl.max(tl.max(largest, axis=2), axis=1)
    peak = tl.maximum(-least, largest)
    total = tl.zeros((SAMPLES,), tl.float64) + count.to(tl.float64)
    square = tl.sum(tl.sum(squares, axis=2), axis=1).to(tl.float64)
    shift = tl.sum(tl.sum(sums, axis=2), axis=1).to(tl.float64) / total
    spread = square - total * shift * shift
    origin = tl.reshape(pivot, (SAMPLES,)).to(tl.float64)
    # Not exact if a value is not finite, squares overflow or underflow, or the pivot is far from the mean.
    is_exact = (square < float("inf")) & (square >= total * 1e-30) & (square <= 16.0 * spread)
    is_exact |= (least == largest) & (square == 0.0)
    negative = tl.zeros((SAMPLES,), tl.float64)  # how many values are -inf
    if tl.min(is_exact.to(tl.int32), axis=0) == 0:
        origin = tl.where(tl.abs(least) < float("inf"), least, tl.where(tl.abs(largest) < float("inf"), largest, 0.0))
        origin = origin.to(tl.float64)
        magnitudes = tl.zeros((SAMPLES, CHANNELS, POSITIONS), tl.float32)
        counts = tl.zeros((SAMPLES, CHANNELS, POSITIONS), tl.int32)
        negatives = tl.zeros((SAMPLES, CHANNELS, POSITIONS), tl.int32)
        wide_sums = tl.zeros((SAMPLES, CHANNELS, POSITIONS), tl.float64)
        wide_squares = tl.zeros((SAMPLES, CHANNELS, POSITIONS), tl.float64)
        for item in range(program, items, programs):
            channel = (item // pieces) * CHANNELS + tl.arange(0, CHANNELS)
            start = (item % pieces) * of_piece
            for tile in range(start, tl.minimum(start + of_piece, across)):
                position = (tile * POSITIONS if POSITIONS > 1 else 0) + tl.arange(0, POSITIONS)
                place, inside = places(channel, position, channels, positions, channel_stride, position_stride)
                value = tl.load(of_sample[:, None, None] + place, mask=inside, other=0.0).to(tl.float32)
                finite = inside & (tl.abs(value) < float("inf"))  # false for nan
                magnitudes = tl.maximum(magnitudes, tl.where(finite, tl.abs(value), 0.0))
                counts += finite.to(tl.int32)
                negatives += (inside & (value == float("-inf"))).to(tl.int32)
                far = tl.where(finite, value.to(tl.float64) - origin[:, None, None], 0.0)
                wide_sums += far
                wide_squares += far * far
        peak = tl.max(tl.max(magnitudes, axis=2), axis=1)
        total = tl.sum(tl.sum(counts, axis=2), axis=1).to(tl.float64)
        negative += tl.sum(tl.sum(negatives, axis=2), axis=1).to(tl.float64)
        shift = tl.sum(tl.sum(wide_sums, axis=2), axis=1) / tl.maximum(total, 1.0)
        spread = tl.maximum(tl.sum(tl.sum(wide_squares, axis=2), axis=1) - total * shift * shift, 0.0)
    row = sample * programs + program
    stride = samples * programs
    tl.store(partials + row, peak.to(tl.float64))
    tl.store(partials + stride + row, total)
    tl.store(partials + 2 * stride + row, origin + shift)
    tl.store(partials + 3 * stride + row, spread)
    tl.store(partials + 4 * stride + row, negative)


@triton.jit
def places(channel, position, channels, positions, channel_stride, position_stride):
    """Where a tile's values lie in a sample, and which of them exist."""
    place = (channel.to(tl.int64) * channel_stride)[:, None] + (position.to(tl.int64) * position_stride)[None, :]
    inside = (channel < channels)[:, None] & (position < positions)[None, :]
    return place[None, :, :], inside[None, :, :]


@triton.jit(do_not_specialize=["samples", "channels", "of_sample", "stamp", "has_past"])
def judge_values(
    partials,
    stamps,
    remembered,
    scale,
    result,
    samples,
    channels,
    of_sample,
    stamp,
    max_abs,
    log_ratio,
    has_past,
    WATCH: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PADDED: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add up, judge and remember: the first program for the batch, every other one for some of the samples.

    Each adds up the whole, so that nobody waits. `result` holds the row, then what is remembered, then the samples.
    """
    stride = samples * PROGRAMS
    pivot = tl.load(partials + 2 * stride)  # so that equal means have a spread of exactly 0
    peaks = tl.zeros((BLOCK,), tl.float64)
    totals = tl.zeros((BLOCK,), tl.float64)
    sums = tl.zeros((BLOCK,), tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, stride, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < stride
        count = tl.load(partials + stride + place, mask=inside, other=0.0)
        off = tl.load(partials + 2 * stride + place, mask=inside, other=0.0) - pivot
        totals += count
        sums += count * off
        squares += tl.load(partials + 3 * stride + place, mask=inside, other=0.0) + count * off * off
        peaks = tl.maximum(peaks, tl.load(partials + place, mask=inside, other=0.0))
    total = tl.sum(totals, axis=0)
    shift = tl.sum(sums, axis=0) / tl.maximum(total, 1.0)
    mean = tl.where(total > 0.0, pivot + shift, 0.0)
    batches = tl.load(scale)
    usual_mean = tl.load(scale + 2)

    if tl.program_id(0) > 0:
        sample = (tl.program_id(0) - 1) * SAMPLES + tl.arange(0, SAMPLES)
        programs = tl.arange(0, PADDED)
        place = sample[:, None] * PROGRAMS + programs[None, :]
        inside = (sample < samples)[:, None] & (programs < PROGRAMS)[None, :]
        counts = tl.load(partials + stride + place, mask=inside, other=0.0)
        center = tl.where(batches > 0.0, usual_mean, mean)
        far = tl.load(partials + 2 * stride + place, mask=inside, other=0.0) - center
        square = tl.load(partials + 3 * stride + place, mask=inside, other=0.0)
        distance = tl.sum(square + counts * far * far, axis=1)
        count = tl.sum(counts, axis=1)
        of_these = result + WIDTH + 5 + 3 * sample
        peak = tl.max(tl.load(partials + place, mask=inside, other=0.0), axis=1)
        tl.store(of_these, peak, mask=sample < samples)
        tl.store(of_these + 1, of_sample - count, mask=sample < samples)
        tl.store(of_these + 2, tl.sqrt(distance / tl.maximum(count, 1.0)), mask=sample < samples)
    else:
        largest = tl.max(peaks, axis=0)
        spread = tl.maximum(tl.sum(squares, axis=0) - total * shift * shift, 0.0)
        std = tl.sqrt(spread / tl.maximum(total, 1.0))
        nonfinite = samples.to(tl.float64) * of_sample - total
        negative = tl.zeros((), tl.float64)
        if nonfinite > 0.0:
            negatives = tl.zeros((BLOCK,), tl.float64)
            for start in range(0, stride, BLOCK):
                place = start + tl.arange(0, BLOCK)
                negatives += tl.load(partials + 4 * stride + place, mask=place < stride, other=0.0)
            negative = tl.sum(negatives, axis=0)

        new = tl.zeros((), tl.int32)
        first_new = channels
        if WATCH:
            for start in range(0, channels, 1024):
                channel = start + tl.arange(0, 1024)
                exists = channel < channels
                constant = exists & (tl.load(stamps + channel, mask=exists, other=0) != stamp)
                known = tl.load(remembered + channel, mask=exists, other=1)
                fresh = constant & (known == 0)
                new += tl.sum(fresh.to(tl.int32), axis=0)
                first_new = tl.minimum(first_new, tl.min(tl.where(fresh, channel, channels), axis=0))
                tl.store(remembered + channel, tl.zeros((1024,), tl.int8) + 1, mask=fresh)

        (
            usual, is_nonfinite, is_beyond, is_constant, is_drifted, is_mask, is_unwanted,
            counted, log_mean, usual_mean, streak, balance,
        ) = judge(
            largest, std, mean, total, nonfinite, negative, new,
            batches, tl.load(scale + 1), usual_mean, tl.load(scale + 3), tl.load(scale + 4),
            max_abs, log_ratio, has_past,
        )  # fmt: skip
        tl.store(result, largest)
        tl.store(result + 1, std)
        tl.store(result + 2, mean)
        tl.store(result + 3, nonfinite)
        tl.store(result + 4, usual)
        tl.store(result + 5, is_nonfinite.to(tl.float64))
        tl.store(result + 6, is_beyond.to(tl.float64))
        tl.store(result + 7, is_constant.to(tl.float64))
        tl.store(result + 8, is_drifted.to(tl.float64))
        tl.store(result + 9, new.to(tl.float64))
        tl.store(result + 10, tl.where(new > 0, first_new, -1).to(tl.float64))
        tl.store(result + 11, is_mask.to(tl.float64))
        tl.store(result + 12, is_unwanted.to(tl.float64))
        tl.store(result + WIDTH, counted)
        tl.store(result + WIDTH + 1, log_mean)
        tl.store(result + WIDTH + 2, usual_mean)
        tl.store(result + WIDTH + 3, streak)
        tl.store(result + WIDTH + 4, balance)
