"""Triton kernels that read a tensor of a batch once and judge it."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (Triton reads a kernel's annotations itself.)

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["stamp", "channels", "positions", "pieces", "piece", "items"])
def read_values(
    values,
    partials,
    stamps,
    channels,
    positions,
    sample_stride,
    channel_stride,
    position_stride,
    pieces,
    piece,
    items,
    stamp,
    WATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """One program's share of one sample: its largest magnitude, how many are finite, their mean and squares around it.

    Sums run in float64, of differences from one of the values: equal values then have a deviation of exactly 0. A
    channel that varies gets this batch's stamp: whoever sees it writes the same number.
    """
    sample = tl.program_id(0)
    program = tl.program_id(1)
    programs = tl.num_programs(1)
    base = values + sample.to(tl.int64) * sample_stride
    own = (program // pieces).to(tl.int64) * CHANNELS * channel_stride + (program % pieces) * piece * position_stride
    pivot = tl.load(base + own).to(tl.float64)
    pivot = tl.where(tl.abs(pivot) < float("inf"), pivot, 0.0)
    peak = tl.zeros((CHANNELS, POSITIONS), tl.float32)
    count = tl.zeros((CHANNELS, POSITIONS), tl.int32)
    sums = tl.zeros((CHANNELS, POSITIONS), tl.float64)
    squares = tl.zeros((CHANNELS, POSITIONS), tl.float64)
    item = program
    while item < items:
        channel = (item // pieces) * CHANNELS + tl.arange(0, CHANNELS)
        place = channel.to(tl.int64) * channel_stride
        start = (item % pieces) * piece
        end = tl.minimum(start + piece, positions)
        varies = tl.zeros((CHANNELS, POSITIONS), tl.int32)
        if WATCH:
            reference = tl.load(values + place, mask=channel < channels, other=0.0).to(tl.float32)
        while start < end:
            position = start + tl.arange(0, POSITIONS)
            inside = (channel < channels)[:, None] & (position < end)[None, :]
            offset = place[:, None] + position.to(tl.int64)[None, :] * position_stride
            value = tl.load(base + offset, mask=inside, other=0.0).to(tl.float32)
            size = tl.abs(value)
            finite = inside & (size < float("inf"))  # false for nan
            peak = tl.maximum(peak, tl.where(finite, size, 0.0))
            count += finite.to(tl.int32)
            distance = tl.where(finite, value.to(tl.float64) - pivot, 0.0)
            sums += distance
            squares += distance * distance
            if WATCH:
                varies |= (inside & (value != reference[:, None])).to(tl.int32)
            start += POSITIONS
        if WATCH:
            marked = (tl.max(varies, axis=1) > 0) & (channel < channels)
            tl.store(stamps + channel, tl.zeros((CHANNELS,), tl.int32) + stamp, mask=marked)
        item += programs
    row = sample * programs + program
    stride = tl.num_programs(0) * programs
    tl.store(partials + row, tl.max(tl.max(peak, axis=1), axis=0).to(tl.float64))
    total = tl.sum(tl.sum(count, axis=1), axis=0).to(tl.float64)
    shift = tl.sum(tl.sum(sums, axis=1), axis=0) / tl.maximum(total, 1.0)
    spread = tl.sum(tl.sum(squares, axis=1), axis=0) - total * shift * shift
    tl.store(partials + stride + row, total)
    tl.store(partials + 2 * stride + row, pivot + shift)
    tl.store(partials + 3 * stride + row, tl.maximum(spread, 0.0))


@triton.jit(do_not_specialize=["samples", "channels", "of_sample", "stamp"])
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
    WATCH: tl.constexpr,
    MAY_FLAG: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PADDED: tl.constexpr,
    SAMPLES: tl.constexpr,
    WIDTH: tl.constexpr,
    ADOPTED: tl.constexpr,
):
    """Add up, judge and remember; a single program, since the verdict needs all of it."""
    stride = samples * PROGRAMS
    programs = tl.arange(0, PADDED)
    pivot = tl.load(partials + 2 * stride)  # so that equal means have a spread of exactly 0
    totals = tl.zeros((SAMPLES,), tl.float64)
    sums = tl.zeros((SAMPLES,), tl.float64)
    start = 0
    while start < samples:
        sample = start + tl.arange(0, SAMPLES)
        place = sample[:, None] * PROGRAMS + programs[None, :]
        inside = (sample < samples)[:, None] & (programs < PROGRAMS)[None, :]
        of_program = tl.load(partials + stride + place, mask=inside, other=0.0)
        totals += tl.sum(of_program, axis=1)
        sums += tl.sum(of_program * (tl.load(partials + 2 * stride + place, mask=inside, other=0.0) - pivot), axis=1)
        start += SAMPLES
    total = tl.sum(totals, axis=0)
    shift = tl.sum(sums, axis=0) / tl.maximum(total, 1.0)
    mean = tl.where(total > 0.0, pivot + shift, 0.0)
    batches = tl.load(scale)
    usual_mean = tl.load(scale + 2)
    center = tl.where(batches > 0.0, usual_mean, mean)

    peaks = tl.zeros((SAMPLES,), tl.float64)
    spreads = tl.zeros((SAMPLES,), tl.float64)
    start = 0
    while start < samples:
        sample = start + tl.arange(0, SAMPLES)
        place = sample[:, None] * PROGRAMS + programs[None, :]
        inside = (sample < samples)[:, None] & (programs < PROGRAMS)[None, :]
        peak = tl.max(tl.load(partials + place, mask=inside, other=0.0), axis=1)
        counts = tl.load(partials + stride + place, mask=inside, other=0.0)
        means = tl.load(partials + 2 * stride + place, mask=inside, other=0.0)
        squares = tl.load(partials + 3 * stride + place, mask=inside, other=0.0)
        off = (means - pivot) - shift
        spread = tl.sum(squares + counts * off * off, axis=1)
        far = means - center
        distance = tl.sum(squares + counts * far * far, axis=1)
        count = tl.sum(counts, axis=1)
        of_these = result + WIDTH + 3 * sample
        tl.store(of_these, peak, mask=sample < samples)
        tl.store(of_these + 1, of_sample - count, mask=sample < samples)
        tl.store(of_these + 2, tl.sqrt(distance / tl.maximum(count, 1.0)), mask=sample < samples)
        peaks = tl.maximum(peaks, peak)
        spreads += spread
        start += SAMPLES
    largest = tl.max(peaks, axis=0)
    std = tl.sqrt(tl.sum(spreads, axis=0) / tl.maximum(total, 1.0))
    nonfinite = samples.to(tl.float64) * of_sample - total

    new = tl.zeros((), tl.int32)
    first_new = channels
    if WATCH:
        start = 0
        while start < channels:
            channel = start + tl.arange(0, 1024)
            exists = channel < channels
            constant = exists & (tl.load(stamps + channel, mask=exists, other=0) != stamp)
            known = tl.load(remembered + channel, mask=exists, other=1)
            fresh = constant & (known == 0)
            new += tl.sum(fresh.to(tl.int32), axis=0)
            first_new = tl.minimum(first_new, tl.min(tl.where(fresh, channel, channels), axis=0))
            tl.store(remembered + channel, tl.zeros((1024,), tl.int8) + 1, mask=fresh)
            start += 1024

    log_mean = tl.load(scale + 1)
    log_std = tl.log(tl.where(std > 0.0, std, 1.0))
    is_nonfinite = nonfinite > 0.0
    is_beyond = largest > max_abs
    is_constant = (new > 0) & MAY_FLAG
    is_drifted = (batches > 0.0) & (std > 0.0) & (tl.abs(log_std - log_mean) > log_ratio)
    flagged = is_nonfinite | is_beyond | is_constant | is_drifted
    usual = tl.where(batches > 0.0, tl.exp(log_mean), float("nan"))
    row = tl.load(scale + 3) + is_drifted.to(tl.float64)
    counted = (std > 0.0) & (flagged == 0)
    adopted = (counted == 0) & (row >= ADOPTED)
    weight = tl.where(adopted, 1.0, tl.where(counted, 1.0 / (batches + 1.0), 0.0))
    tl.store(scale, tl.where(adopted, 1.0, tl.where(counted, batches + 1.0, batches)))
    tl.store(scale + 1, log_mean + weight * (log_std - log_mean))
    tl.store(scale + 2, usual_mean + weight * (mean - usual_mean))
    tl.store(scale + 3, tl.where(counted | adopted, 0.0, row))

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
    tl.store(result + 11, flagged.to(tl.float64))
