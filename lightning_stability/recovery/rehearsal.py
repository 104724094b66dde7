"""Running `training_step` on a batch as if it had not been run."""

from __future__ import annotations

import contextlib
import copy
import importlib
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_stability._compat import is_instance_by_name
from lightning_stability.recovery.attributes import Attributes, put_dict_back
from lightning_stability.recovery.precision import namespace_of
from lightning_stability.recovery.random_state import RandomState

_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")


def why_not(trainer: Any) -> str | None:
    """Why the Trainer's `training_step` cannot be run once more than it would be; None if it can.

    Args:
        trainer: The Trainer, within `fit`.
    """
    if not trainer.lightning_module.automatic_optimization:
        return "with manual optimization `training_step` steps the optimizers itself"
    if not is_instance_by_name(trainer.strategy, *_STRATEGIES):
        return f"{type(trainer.strategy).__name__} keeps the weights in pieces"
    if type(trainer.fit_loop._data_fetcher).__name__ == "_DataLoaderIterDataFetcher":
        return "`training_step` takes its batches from an iterator"
    return None


class Rehearsal:
    """Runs `training_step` any number of times and leaves no trace: see `Attributes` for what is put back.

    Besides these, attributes of the Trainer, its callbacks and data module, learning rates and schedulers, and the
    random state are. The batch is a copy, no gradient is made, `self.log` does nothing, loggers and the profiler are
    dummies. A `training_step` that asks for the folder of the logs would write there, and gets an error. Under DDP the
    module is called, not its wrapper. Compiled modules are run uncompiled.

    Args:
        trainer: The Trainer, when a batch is about to be trained.

    Raises:
        CannotPutBack: If the module holds something whose state cannot be had.

    Example::

        with Rehearsal(trainer) as rehearsal:
            loss = rehearsal.run(batch, batch_idx)
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._module = trainer.lightning_module
        self._stack = contextlib.ExitStack()
        self.runs_uncompiled = hasattr(torch.compiler, "set_stance")  # torch 2.6

    def __enter__(self) -> Rehearsal:
        with contextlib.ExitStack() as stack:
            trainer, module = self._trainer, self._module
            random_state = RandomState.taken(trainer.strategy.root_device)
            stack.callback(random_state.put_back)
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            # which may hold weights cast without gradients, if `fit` is called within autocast
            stack.callback(torch.clear_autocast_cache)
            attributes = Attributes(module, trainer, trainer.strategy, trainer._logger_connector)
            stack.callback(attributes.put_back)
            loops = [trainer.fit_loop, trainer.fit_loop.epoch_loop]
            for within_reach in (*loops, *trainer.callbacks, *filter(None, [trainer.datamodule])):
                stack.callback(put_dict_back, vars(within_reach), dict(vars(within_reach)))
            stack.callback(_Schedule(trainer).put_back)
            self._silence()
            stack.enter_context(torch.no_grad())
            if self.runs_uncompiled:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _silence(self) -> None:
        """Let nothing that is measured get anywhere; `Attributes` puts the loggers back."""
        trainer, namespace = self._trainer, namespace_of(self._trainer)
        for module in self._module.modules():
            if is_instance_by_name(module, "LightningModule"):
                module.log = module.log_dict = _do_nothing
        epoch_loop = trainer.fit_loop.epoch_loop  # for whoever calls `super().log`
        epoch_loop._results = type(epoch_loop._results)(training=True)
        trainer.loggers = [_stand_in(logger, namespace) for logger in trainer.loggers]
        trainer.profiler = importlib.import_module(f"{namespace}.profilers").PassThroughProfiler()

    def run(self, batch: Any, batch_idx: int) -> Any:
        """Run `training_step` in the precision that is trained in.

        Args:
            batch: As `training_step` would get it.
            batch_idx: Its index.

        Returns:
            What `training_step` returns.
        """
        with self._trainer.precision_plugin.train_step_context():
            return self._call(copy.deepcopy(batch), batch_idx)

    def run_in_fp32(self, batch: Any, batch_idx: int, uncast: Any = None) -> Any:
        """Run `training_step` without autocast, and on fp32 copies of 16-bit weights.

        Args:
            batch: As `training_step` would get it.
            batch_idx: Its index.
            uncast: The batch before a 16-true precision converted it, still where the loader put it. None takes
                `batch` and widens it.

        Returns:
            What `training_step` returns.
        """
        narrow = getattr(self._trainer.precision_plugin, "_desired_input_dtype", None)
        if narrow is None:
            return self._call(copy.deepcopy(batch), batch_idx)
        with _wide_weights(self._module, narrow):
            return self._call(self._wide_batch(batch, uncast), batch_idx)

    def _call(self, batch: Any, batch_idx: int) -> Any:
        kwargs = self._trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, batch_idx)
        return self._module.training_step(*kwargs.values())

    def _wide_batch(self, batch: Any, uncast: Any) -> Any:
        if uncast is None:
            narrow = self._trainer.precision_plugin._desired_input_dtype
            return apply_to_collection(batch, Tensor, lambda t: t.float() if t.dtype == narrow else t.clone())
        wide = self._module._on_before_batch_transfer(copy.deepcopy(uncast), dataloader_idx=0)
        return self._trainer.strategy.batch_to_device(wide, dataloader_idx=0)


class _Schedule:
    """The optimizers' learning rates and other options, and the schedulers, which a `training_step` may reach for.

    Of an optimizer's state the entries are put back, and not what is written into their tensors: copies of these would
    take more memory than a training step has left.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._undo: list[Callable[[], None]] = []
        for optimizer in trainer.optimizers:
            groups = optimizer.param_groups
            self._undo.append(partial(operator.setitem, groups, slice(None), list(groups)))
            states = [state for state in optimizer.state.values() if isinstance(state, dict)]
            self._keep([optimizer.state, *states, *groups])
        for config in trainer.lr_scheduler_configs:
            state = copy.deepcopy(config.scheduler.state_dict())
            self._undo.insert(0, partial(config.scheduler.load_state_dict, state))

    def put_back(self) -> None:
        """All of it is as it was."""
        for undo in self._undo:
            undo()

    def _keep(self, mappings: list[Any]) -> None:
        for mapping in mappings:
            kept = dict(mapping)
            self._undo += [partial(mapping.update, kept), partial(_drop, mapping, set(kept))]
            for name, value in kept.items():
                if isinstance(value, list):  # the weights of a group
                    self._undo.append(partial(operator.setitem, value, slice(None), list(value)))
                elif isinstance(value, Tensor) and name == "lr":  # may be written in place
                    self._undo.append(partial(value.copy_, value.clone()))  # type: ignore[arg-type]


def _drop(mapping: Any, kept: set[Any]) -> None:
    for name in set(mapping) - kept:
        del mapping[name]


@contextlib.contextmanager
def _wide_weights(module: nn.Module, narrow: torch.dtype) -> Iterator[None]:
    """fp32 copies in the places of 16-bit parameters and buffers, which are not touched themselves.

    (`WiderWeights` changes them in place, for good; DDP's gradient hooks would not survive that.)
    """
    places: list[tuple[nn.Module, str, Tensor]] = []
    wide: dict[int, Tensor] = {}
    try:
        for owner in module.modules():
            for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
                if tensor is None or tensor.dtype != narrow:
                    continue
                if id(tensor) not in wide:  # tied weights stay tied
                    copied = tensor.detach().float()
                    is_weight = isinstance(tensor, nn.Parameter)
                    wide[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if is_weight else copied
                places.append((owner, name, tensor))
                setattr(owner, name, wide[id(tensor)])
        yield
    finally:
        for owner, name, tensor in places:
            setattr(owner, name, tensor)


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for `self.log`."""


def _stand_in(logger: Any, namespace: str) -> Any:
    """A dummy that goes by the logger's name, and refuses to say where that writes."""
    dummy = importlib.import_module(f"{namespace}.loggers.logger").DummyLogger
    own = {"name": property(lambda self: logger.name), "version": property(lambda self: logger.version)}
    own |= dict.fromkeys(("save_dir", "log_dir", "root_dir"), property(_refuse))
    return type("StandIn", (dummy,), own)()


def _refuse(logger: Any) -> None:
    raise RuntimeError("`training_step` asks for the folder of the logs, where it may write files")
