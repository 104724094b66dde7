"""One of two ranks that measure the gradients of FSDP1 modules, started by test_fsdp1_norms.py.

usage: fsdp1_norms.py FOLDER
"""

import json
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy

from lightning_stability.health import GradientMeter, LateReads, ParameterGroups
from lightning_stability.health.buckets import shard_groups


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 200), nn.ReLU(), nn.Linear(200, 201, bias=False))


def loss_of(net: nn.Module, rank: int, bad_rank: int | None) -> torch.Tensor:
    batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(rank))
    return net(batch).pow(2).mean() * (math.nan if rank == bad_rank else 1.0)


def reference() -> dict[str, float]:
    """The norms of the gradients' mean over both ranks."""
    net = make_net()
    (sum(loss_of(net, rank, None) for rank in range(2)) / 2).backward()
    return {name: float(p.grad.double().norm()) for name, p in net.named_parameters()}


def measure(net: nn.Module, rank: int, bad_rank: int | None = None) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    names = {parameter: name for name, parameter in net.named_parameters()}
    meter, reads, measured = GradientMeter(optimizer, names, False, shard_groups(net)), LateReads(), []
    loss_of(net, rank, bad_rank).backward()
    meter.measure({})
    total = float(meter.total_norm())
    meter.remember_weights()
    optimizer.step()
    meter.send(reads, measured.append)
    reads.drain()
    norms = dict(zip(meter.parameter_names, measured[0].grad_norms.tolist(), strict=True))
    updates = math.hypot(*measured[0].update_norms)
    groups = ParameterGroups(meter.parameter_names, 1)
    return {"norms": norms, "total": total, "updates": updates, "groups": groups.names}


def main() -> None:
    warnings.simplefilter("ignore")
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    results: dict[str, Any] = {"reference": reference()}
    for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD):
        for original in (True, False):
            net, options = make_net(), {"use_orig_params": original, "sharding_strategy": strategy}
            options["device_id"] = torch.device("cpu")
            net[2] = FSDP(net[2], **options)
            whole = FSDP(net, **options)
            key = f"{strategy.name} {'original' if original else 'flat'}"
            results[key] = measure(whole, rank)
            results[f"{key}, NaN on rank 1"] = measure(whole, rank, bad_rank=1)
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
