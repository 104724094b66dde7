"""Copies of a run's state in host memory, and restoring the newest of them that later steps have confirmed.

`RunState` knows where the state is, `Snapshots` keeps two copies of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_stability import internals
from lightning_stability.recovery.metric_undo import MetricSnapshot, MetricUndo
from lightning_stability.recovery.odd_numbers import OddNumber, restore_odd_numbers
from lightning_stability.recovery.tensors import is_writable, sizes_by_device, values_of

CONFIRMED_BY = 10
"""Healthy steps in a row after a snapshot that make it trusted."""


class HostCopies(Protocol):
    """Copies nested state to host memory that it uses again (`checkpointing.snapshot.HostSnapshot`)."""

    def take(self, state: Any) -> tuple[Any, Callable[[], None]]:
        """The copy, and a function that waits until it is complete."""


class RunState:
    """Where the state is that an optimizer step changes: everything that has to be restored to go back to a step.

    These are the module's parameters, buffers and plain tensor attributes; optimizers with their options; learning-rate
    schedulers; the loss scaler; metrics; and tensors that other callbacks keep, such as an average of the weights. Of
    sharded tensors it is this rank's part.

    Args:
        trainer: The Trainer, in `fit`.
        callbacks: Returns the callbacks whose tensors count.
    """

    def __init__(self, trainer: Any, callbacks: Callable[[], Iterable[Any]] = tuple) -> None:
        self._trainer = trainer
        self._callbacks = callbacks
        self._metrics = MetricUndo(trainer.lightning_module, lambda: internals.logged_results(trainer))

    def trained(self) -> dict[str, Any]:
        """What optimizers write, and nobody else."""
        trainer = self._trainer
        states = [_local_tree(dict(optimizer.state)) for optimizer in trainer.optimizers]
        return {"weights": self._trained_weights(), "states": states}

    def others(self) -> dict[str, Any]:
        """Everything else but the metrics."""
        trainer, module = self._trainer, self._trainer.lightning_module
        trained = self._trained_weights()
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = internals.scaler_state(trainer.precision_plugin)
        return {
            "tensors": {n: _local(t) for n, t in named.items() if n not in trained and not is_lazy(t)},
            "options": [_options_of(optimizer) for optimizer in trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "scale": scale,
            "scaler": scaler.state_dict() if scaler is not None and not scale else None,
            "held": {key: tensor for key, _, tensor in self._held()},
        }

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The module's."""
        parameters: Iterator[tuple[str, nn.Parameter]] = self._trainer.lightning_module.named_parameters()
        return parameters

    def metrics(self) -> list[MetricSnapshot]:
        """The states of all metrics of the epoch; copied already."""
        self._metrics.rescan()
        return self._metrics.snapshot()

    def nbytes(self) -> int:
        """The size of all tensors in it; optimizers that have not stepped yet count as two numbers for each weight."""
        trained, others = self.trained(), self.others()
        size = _nbytes(trained) + _nbytes(others)
        return size if any(trained["states"]) else size + 2 * _nbytes(trained["weights"])

    def finite(self) -> Tensor:
        """Whether all that optimizers write is finite, without a host read; 0-dimensional, bool."""
        found: Tensor | None = None
        tensors = (values_of(tensor) for tensor in _tensors(self.trained()))
        for _, sizes in sizes_by_device([values for values in tensors if values is not None]):
            flag = torch.isfinite(sizes).all()
            found = flag if found is None else found & flag.to(found.device)
        return torch.ones((), dtype=torch.bool) if found is None else found

    @torch.no_grad()
    def restore(self, trained: dict[str, Any], others: dict[str, Any], metrics: list[MetricSnapshot]) -> None:
        """Make everything what it was. Nobody's tensors are replaced where their memory can be written."""
        trainer, module = self._trainer, self._trainer.lightning_module
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name, kept in {**trained["weights"], **others["tensors"]}.items():
            if name in named and not _write(named[name], kept):
                named[name].data = kept.to(named[name].device, copy=True)
        for parameter in module.parameters():
            parameter.grad = None
        for optimizer, state, options in zip(trainer.optimizers, trained["states"], others["options"], strict=True):
            _restore_state(optimizer, state)
            _set_options(optimizer, options)
        for config, state in zip(trainer.lr_scheduler_configs, others["schedulers"], strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))
        self._restore_scaler(others)
        for key, setter, tensor in list(self._held()):
            kept = others["held"].get(key)
            if kept is not None and not _write(tensor, kept):
                setter(kept.to(tensor.device, copy=True))
        self._metrics.rescan()
        self._metrics.restore_snapshot(metrics)
        for item in (internals.logged_results(trainer) or {}).values():
            if internals.is_logged_tensor(item) and not item.update_count:
                internals.mark_unlogged(item)

    def _trained_weights(self) -> dict[str, Tensor]:
        groups = [group for optimizer in self._trainer.optimizers for group in optimizer.param_groups]
        held = {id(parameter) for group in groups for parameter in group["params"]}
        parameters = self._trainer.lightning_module.named_parameters()
        return {name: _local(p) for name, p in parameters if id(p) in held and not is_lazy(p)}

    def _restore_scaler(self, others: dict[str, Any]) -> None:
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        if scaler is None:
            return  # the precision has been changed since
        if others["scale"]:
            internals.set_scaler_state(self._trainer.precision_plugin, others["scale"])
        elif others["scaler"]:
            scaler.load_state_dict(others["scaler"])

    def _held(self) -> Iterator[tuple[Any, Callable[[Tensor], None], Tensor]]:
        """Tensors that modules, optimizers and callbacks keep as plain attributes: a key, what replaces it, and it."""
        module = self._trainer.lightning_module
        own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        for path, part in module.named_modules():
            if not isinstance(part, Metric):
                yield from _attributes_of(part, ("module", path), own, containers=False)
        for index, optimizer in enumerate(self._trainer.optimizers):
            yield from _attributes_of(optimizer, ("optimizer", index), own, containers=True)
        for index, callback in enumerate(self._callbacks()):
            yield from _attributes_of(callback, ("callback", index, type(callback).__name__), own, containers=True)


@dataclass(eq=False)
class Snapshot:
    """A run's state after one of its steps.

    Attributes:
        step: Optimizer steps made before it (`trainer.global_step`).
        epoch: The epoch it was taken in.
        batch: Batches trained before it, over the whole run.
        position: Updates that have made the state what it is.
        trusted: Whether healthy steps have followed it.
    """

    step: int
    epoch: int
    batch: int
    position: int = 0
    trusted: bool = False
    healthy: int = 0
    trained: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    metrics: list[MetricSnapshot] = field(default_factory=list)
    waits: list[Callable[[], None]] = field(default_factory=list)

    def wait(self) -> None:
        """Wait until the copies are complete."""
        for wait in self.waits:
            wait()


class Snapshots:
    """Two copies of a run's state: the newest trusted one, and a newer one that is not trusted yet.

    On a GPU what optimizers write is copied to pinned memory beside the forward and backward pass that follow;
    `before_update` makes the next update wait for it.

    Args:
        device: Where it is trained.
        new_copies: Makes what copies to the host.
        agree: Whether a flag is true on all ranks; each holds its own part of sharded tensors.
    """

    def __init__(
        self,
        state: RunState,
        device: torch.device,
        new_copies: Callable[[], HostCopies],
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self._agree = agree
        self.state = state
        self.trusted: Snapshot | None = None
        self._newest: Snapshot | None = None
        self._device = device
        self._memory = [(new_copies(), new_copies()) for _ in range(2)]
        self._in_use = 1  # the place in `_memory` of the trusted one
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._copied: Any = None

    @property
    def is_waiting(self) -> bool:
        """Whether the newest is not trusted yet: no other is taken until it is."""
        return self._newest is not self.trusted

    @torch.no_grad()
    def take(self, snapshot: Snapshot) -> None:
        """Copy the state of now. One that is trusted from the start is used until a newer one is."""
        beside, at_once = self._memory[1 - self._in_use]
        finite = self.state.finite()
        snapshot.others, wait = at_once.take({**self.state.others(), "finite": finite})
        snapshot.waits = [wait]
        snapshot.metrics = self.state.metrics()
        if self._side is None:
            snapshot.trained, wait = beside.take(self.state.trained())
        else:
            self._side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._side):
                snapshot.trained, wait = beside.take(self.state.trained())
                self._copied = self._side.record_event()
        snapshot.waits.append(wait)
        self._newest = snapshot
        if snapshot.trusted:
            self._trust(snapshot)

    def before_update(self) -> None:
        """An optimizer is about to write what is being copied."""
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
            self._copied = None

    def judge(self, step: int, healthy: bool) -> None:
        """A step's numbers are known. Enough healthy ones in a row after a snapshot make it trusted."""
        newest = self._newest
        if newest is None or newest is self.trusted or step < newest.step:
            return
        newest.healthy = newest.healthy + 1 if healthy else 0
        if newest.healthy >= CONFIRMED_BY:
            newest.wait()  # it was copied steps ago
            if self._agree(bool(newest.others["finite"])):
                self._trust(newest)
            else:
                self._newest = self.trusted

    def restore_odd_numbers(self) -> list[OddNumber]:
        """Restore single numbers that went astray from the trusted one; a newer one may hold them, and is dropped."""
        kept = self.trusted
        if kept is None:
            return []
        kept.wait()
        self.before_update()
        names = {parameter: name for name, parameter in self.state.named_parameters()}
        restored = restore_odd_numbers(self.state.trained(), kept.trained, names)
        if restored:
            self._newest = kept
        return restored

    def adopt(self, snapshot: Snapshot) -> None:
        """Go back to this one until another is trusted."""
        self.trusted = self._newest = snapshot

    def _trust(self, snapshot: Snapshot) -> None:
        snapshot.trusted, self.trusted = True, snapshot
        self._in_use = 1 - self._in_use

    def restore(self, epoch: int) -> Snapshot:
        """Restore the newest trusted one. Metrics of an epoch that is over are not: those of this one begin anew.

        Raises:
            RuntimeError: If none has been taken.
        """
        kept = self.trusted
        if kept is None:
            raise RuntimeError("no snapshot has been taken")
        kept.wait()
        self.before_update()
        self._newest = kept  # a newer one has seen what is being left
        self.state.restore(kept.trained, kept.others, kept.metrics if kept.epoch == epoch else [])
        if kept.epoch == epoch:
            kept.metrics = self.state.metrics()  # (what was restored is written on)
        return kept


_NOT_OF_OPTIMIZERS = frozenset({"state", "param_groups", "defaults"})


def _attributes_of(
    owner: Any, key: tuple[Any, ...], own: set[int], containers: bool
) -> Iterator[tuple[Any, Callable[[Tensor], None], Tensor]]:
    for name, value in list(vars(owner).items()):
        if name in _NOT_OF_OPTIMIZERS or name.startswith("__"):
            continue
        if _is_plain(value, own):
            yield (*key, name), partial(setattr, owner, name), value
        elif containers and isinstance(value, nn.Module) and not _is_lightning_module_of_fit(value, own):
            for path, tensor in (*value.named_parameters(), *value.named_buffers()):
                if not is_lazy(tensor):
                    yield (*key, name, path), partial(setattr, tensor, "data"), tensor
        elif containers and isinstance(value, (dict, list)):
            for place, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
                if _is_plain(item, own):
                    yield (*key, name, place), partial(value.__setitem__, place), item


def _is_plain(value: Any, own: set[int]) -> bool:
    return isinstance(value, Tensor) and id(value) not in own and not is_lazy(value)


def _is_lightning_module_of_fit(module: nn.Module, own: set[int]) -> bool:
    return any(id(parameter) in own for parameter in module.parameters())


def _restore_state(optimizer: Any, kept: dict[Any, dict[str, Any]]) -> None:
    """Restore each parameter's state; what has none in the copy had not been trained yet."""
    for parameter in [p for p in optimizer.state if p not in kept]:
        del optimizer.state[parameter]
    for parameter, values in kept.items():
        if not isinstance(values, dict):
            optimizer.state[parameter] = copy.deepcopy(values)
            continue
        state = optimizer.state[parameter]
        for name in [name for name in state if name not in values]:
            del state[name]
        for name, value in values.items():
            now = state.get(name)
            if not isinstance(value, Tensor):
                state[name] = copy.deepcopy(value)
            elif not (isinstance(now, Tensor) and _write(now, value)):
                state[name] = value.to(now.device if isinstance(now, Tensor) else parameter.device, copy=True)


def _options_of(optimizer: Any) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def _set_options(optimizer: Any, options: list[dict[str, Any]]) -> None:
    for group, kept in zip(optimizer.param_groups, options, strict=False):
        for name, value in kept.items():
            now = group.get(name)
            if not (isinstance(value, Tensor) and isinstance(now, Tensor) and _write(now, value)):
                group[name] = copy.deepcopy(value)


def _write(target: Tensor, kept: Tensor) -> bool:
    """Write a copy into a tensor's own memory; False if it cannot be."""
    memory = _local(target)
    if internals.has_own_dispatch(memory):
        if memory is not kept:  # else its class cannot be copied
            memory.copy_(kept)
        return True
    if memory.is_nested or kept.is_nested:
        return False
    strided = memory.layout == kept.layout == torch.strided and not memory.is_quantized
    if not strided or memory.shape != kept.shape or not is_writable(memory):
        return False
    memory.copy_(kept)
    return True


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, without its history."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach()


def _local_tree(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _local(value)
    if isinstance(value, dict):
        return {key: _local_tree(item) for key, item in value.items()}
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _nbytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))
