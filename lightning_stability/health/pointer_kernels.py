"""Triton kernels for the norms of tensors that are known by their addresses."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (Triton reads a kernel's annotations itself.)

import triton
import triton.language as tl


# Alignment is looked at where it counts, and told: the same kernel then serves every slice of a table.
@triton.jit(do_not_specialize_on_alignment=["addresses", "chunk_tensor", "chunk_start", "chunk_length", "partials"])
def sum_squares(
    addresses,
    chunk_tensor,
    chunk_start,
    chunk_length,
    partials,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the squares of one chunk of one tensor, in float64 and always in the same order."""
    chunk = tl.program_id(0)
    start = tl.load(chunk_start + chunk)
    length = tl.load(chunk_length + chunk)
    address = tl.load(addresses + tl.load(chunk_tensor + chunk))
    values = address.to(tl.pointer_type(DTYPE)) + start
    if ALIGNED:  # to 16 bytes
        values = tl.multiple_of(values, 16)
    length = tl.where(address == 0, 0, length)  # an absent gradient
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    if length == CHUNK:  # without a mask the loads are wide
        for offset in tl.static_range(0, CHUNK, BLOCK):
            value = tl.load(values + offset + lanes).to(tl.float64)
            sums += value * value
    else:
        for offset in tl.static_range(0, CHUNK, BLOCK):
            value = tl.load(values + offset + lanes, mask=offset + lanes < length, other=0.0).to(tl.float64)
            sums += value * value
    tl.store(partials + chunk, tl.sum(sums, axis=0))


@triton.jit(do_not_specialize_on_alignment=["partials", "first_chunk", "rider_0", "rider_1", "row"])
def fill_row(partials, first_chunk, rider_0, rider_1, row, BLOCK: tl.constexpr):
    """Write one number of a row: a tensor's norm, after those the total, then the two that only travel along.

    The total is the norm of a tensor that all chunks belong to: nobody waits for another program's norm.
    """
    place = tl.program_id(0)
    rider = place - (tl.num_programs(0) - 2)
    if rider == 0:
        tl.store(row + place, tl.load(rider_0).to(tl.float64))
    elif rider == 1:
        tl.store(row + place, tl.load(rider_1).to(tl.float64))
    else:
        offset = tl.load(first_chunk + 2 * place)
        end = tl.load(first_chunk + 2 * place + 1)
        lanes = tl.arange(0, BLOCK)
        sums = tl.zeros((BLOCK,), tl.float64)
        while offset < end:
            sums += tl.load(partials + offset + lanes, mask=offset + lanes < end, other=0.0)
            offset += BLOCK
        tl.store(row + place, tl.sqrt(tl.sum(sums, axis=0)))
