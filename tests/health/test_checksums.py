"""Check sums of batches and states: any changed bit, shape, dtype or order gives another one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_stability.health.checksums import BatchChecksum, checksum_of_all

DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8),
    *(torch.bool, torch.complex64, torch.float8_e4m3fn),
]


def on_device(checksum: BatchChecksum, tensor: Tensor) -> int:
    """What is done on a GPU, done here."""
    return int(checksum._of_all(checksum._of_rows(tensor)))


def flipped(tensor: Tensor, byte: int, bit: int) -> Tensor:
    other = tensor.clone()
    other.view(-1).view(torch.uint8)[byte] ^= 1 << bit
    return other


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_changed_bit_changes_every_sum(dtype: torch.dtype) -> None:
    tensor, checksum = torch.randint(0, 2, (3, 5)).to(dtype), BatchChecksum()
    before = checksum.of(tensor), on_device(checksum, tensor), checksum_of_all([tensor])
    size = tensor.numel() * tensor.itemsize
    for byte in (0, size // 2, size - 1):
        other = flipped(tensor, byte, 0 if dtype == torch.bool else 6)
        after = checksum.of(other), on_device(checksum, other), checksum_of_all([other])
        assert all(a != b for a, b in zip(before, after, strict=True)), byte
    assert (checksum.of(tensor), on_device(checksum, tensor), checksum_of_all([tensor])) == before


def test_order_counts_within_a_sample_among_samples_and_among_tensors() -> None:
    tensor, checksum = torch.randn(4, 6), BatchChecksum()
    for other in (tensor.flip(0), tensor.flip(1), tensor[torch.tensor([1, 0, 2, 3])]):
        assert checksum.of(other) != checksum.of(tensor)
        assert on_device(checksum, other) != on_device(checksum, tensor)
    a, b = torch.randn(4), torch.randn(4)
    assert checksum.of([a, b]) != checksum.of([b, a])
    assert checksum_of_all([a, b]) != checksum_of_all([b, a])


def test_shape_dtype_and_place_count() -> None:
    checksum, tensor = BatchChecksum(), torch.zeros(2, 6)
    sums = [checksum.of(batch)[0] for batch in (tensor, tensor.view(6, 2), tensor.double(), {"x": tensor}, [tensor])]
    assert len(set(sums)) == len(sums)


@pytest.mark.parametrize(
    "batch",
    [
        [],
        {"name": "a", "count": 3},
        torch.zeros(0, 3),
        torch.tensor(1.5),
        torch.eye(3).to_sparse(),
        torch.zeros(4, 6)[:, ::2],
        torch.zeros(6)[1:].view(torch.float32),
        torch.zeros(2, device="meta"),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    ],
    ids=["nothing", "no tensors", "empty", "scalar", "sparse", "strided", "offset", "meta", "jagged"],
)
def test_whatever_a_batch_holds_has_a_sum(batch: Any) -> None:
    on_host, others = BatchChecksum().of(batch)
    assert isinstance(on_host, int)
    assert others == []
    if isinstance(batch, Tensor):
        checksum_of_all([batch])
