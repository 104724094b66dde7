"""`fully_shard` (FSDP2), wherever this torch has it, and which torch has it for a CPU."""

import pytest
import torch

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # torch before 2.6
    from torch.distributed._composable.fsdp import fully_shard

__all__ = ["NEEDS_FSDP2", "fully_shard"]

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
NEEDS_FSDP2 = pytest.mark.skipif(VERSION < (2, 7), reason="FSDP2 on a CPU came with torch 2.7")
