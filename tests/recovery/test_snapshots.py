"""Snapshots: which one is trusted, and what a restored state is."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lightning_stability.checkpointing.snapshot import HostSnapshot
from lightning_stability.recovery.snapshots import CONFIRMED_BY, RunState, Snapshot, Snapshots
from tests import runs


class Shadow:
    """An average of the weights that is no module."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = [parameter.detach().clone() for parameter in module.parameters()]
        self.by_name = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        self.steps = torch.zeros((), dtype=torch.int64)
        self.module = nn.Linear(2, 2)


def trained(one: Any, **options: Any) -> tuple[Any, Snapshots, Shadow]:
    """A real Trainer in the middle of its second batch's end."""
    got: list[Any] = []

    class Grab(one.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            if trainer.global_step == 2:
                shadow = Shadow(module)
                snapshots = Snapshots(RunState(trainer, lambda: [shadow]), torch.device("cpu"), HostSnapshot)
                check(trainer, snapshots, shadow)
                got.append(True)

    def check(trainer: Any, snapshots: Snapshots, shadow: Shadow) -> None:
        got.extend([SimpleNamespace(trainer=trainer), snapshots, shadow])
        options["check"](trainer, snapshots, shadow)

    trainer = runs.trainer(one, callbacks=[Grab()], max_steps=4)
    trainer.fit(runs.make_module(one, optimizer=options.get("optimizer")), runs.data())
    assert got
    return tuple(got[:3])  # type: ignore[return-value]


def values(trainer: Any, shadow: Shadow) -> list[torch.Tensor]:
    module = trainer.lightning_module
    states = [
        t for o in trainer.optimizers for s in o.state.values() for t in s.values() if isinstance(t, torch.Tensor)
    ]
    of_shadow = [*shadow.weights, *shadow.by_name.values(), shadow.steps, *shadow.module.parameters()]
    return [t.detach().clone() for t in (*module.parameters(), *module.buffers(), *states, *of_shadow)]


def spoil(trainer: Any, shadow: Shadow) -> None:
    with torch.no_grad():
        for parameter in trainer.lightning_module.parameters():
            parameter.fill_(float("nan"))
        for state in trainer.optimizers[0].state.values():
            state["exp_avg"].fill_(float("inf"))
            state["step"] += 5
        for tensor in (*shadow.weights, *shadow.by_name.values(), *shadow.module.parameters()):
            tensor.fill_(7.0)
        shadow.steps = shadow.steps + 3
        trainer.optimizers[0].param_groups[0]["lr"] = float("nan")


def test_everything_is_restored_in_its_own_memory(one: Any) -> None:
    def check(trainer: Any, snapshots: Snapshots, shadow: Shadow) -> None:
        before = values(trainer, shadow)
        places = [parameter.data_ptr() for parameter in trainer.lightning_module.parameters()]
        snapshots.take(Snapshot(2, 0, 2, trusted=True))
        spoil(trainer, shadow)
        snapshots.restore(epoch=0)
        assert all(torch.equal(a, b) for a, b in zip(values(trainer, shadow), before, strict=True))
        assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-3
        assert [parameter.data_ptr() for parameter in trainer.lightning_module.parameters()] == places

    trained(one, check=check)


def test_a_snapshot_is_trusted_after_healthy_steps_in_a_row(one: Any) -> None:
    def check(trainer: Any, snapshots: Snapshots, shadow: Shadow) -> None:
        snapshots.take(Snapshot(2, 0, 2, trusted=True))
        newer = Snapshot(3, 0, 3)
        snapshots.take(newer)
        for step in range(3, 3 + CONFIRMED_BY - 1):
            snapshots.judge(step, healthy=True)
        snapshots.judge(20, healthy=False)
        snapshots.judge(2, healthy=True)  # of before it
        for step in range(21, 21 + CONFIRMED_BY):
            assert snapshots.trusted is not newer
            snapshots.judge(step, healthy=True)
        assert snapshots.trusted is newer

    trained(one, check=check)


def test_a_snapshot_that_is_not_finite_is_never_trusted(one: Any) -> None:
    def check(trainer: Any, snapshots: Snapshots, shadow: Shadow) -> None:
        first = Snapshot(2, 0, 2, trusted=True)
        snapshots.take(first)
        state = next(iter(trainer.optimizers[0].state.values()))
        state["exp_avg_sq"][0] = float("inf")  # finite gradients, a frozen parameter
        snapshots.take(Snapshot(3, 0, 3))
        for step in range(3, 3 + CONFIRMED_BY):
            snapshots.judge(step, healthy=True)
        assert snapshots.trusted is first
        snapshots.restore(epoch=0)
        assert bool(torch.isfinite(state["exp_avg_sq"]).all())

    trained(one, check=check)


def test_a_newer_snapshot_leaves_the_trusted_one_as_it_was(one: Any) -> None:
    def check(trainer: Any, snapshots: Snapshots, shadow: Shadow) -> None:
        before = values(trainer, shadow)
        snapshots.take(Snapshot(2, 0, 2, trusted=True))
        for step in (3, 4, 5):
            spoil(trainer, shadow)
            snapshots.take(Snapshot(step, 0, step))
        snapshots.restore(epoch=0)
        assert all(torch.equal(a, b) for a, b in zip(values(trainer, shadow), before, strict=True))

    trained(one, check=check)


def test_before_the_first_update_the_optimizer_has_no_state(one: Any) -> None:
    def check(trainer: Any, snapshots: Snapshots, shadow: Shadow) -> None:
        kept = dict(trainer.optimizers[0].state)
        trainer.optimizers[0].state.clear()
        snapshots.take(Snapshot(0, 0, 0, trusted=True))
        trainer.optimizers[0].state.update(kept)
        snapshots.restore(epoch=0)
        assert not trainer.optimizers[0].state

    trained(one, check=check)
