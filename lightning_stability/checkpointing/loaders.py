"""Where the training data is: the state of loaders, samplers and generators, per rank.

The private names of Lightning's data fetcher and CombinedLoader are touched here alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from lightning_fabric.utilities.data import _set_sampler_epoch, sized_len
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_stability._compat import is_instance_by_name
from lightning_stability.checkpointing.random_state import RandomState, capture_random_state, restore_random_state

OrderState = dict[str, Any]
"""The random state, and that of the loaders' generators, from which an epoch's order is drawn."""

_FINISHED = "_iterator_finished"  # torchdata's key in the state of a StatefulDataLoader


class TrainingData:
    """The training data of one Trainer and rank.

    Args:
        trainer: A Trainer of either namespace, from `on_train_start` on.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._order: OrderState | None = None
        self._ahead: dict[str, Any] | None = None

    @property
    def loaders(self) -> list[Any]:
        """The loaders, without what combines them."""
        return list(self._trainer.fit_loop._combined_loader.flattened)

    @property
    def without_position(self) -> list[Any]:
        """The loaders whose position cannot be saved."""
        return [loader for loader in self.loaders if not _is_stateful(loader)]

    @property
    def has_workers(self) -> bool:
        """Whether other processes load."""
        return any(getattr(loader, "num_workers", 0) > 0 for loader in self.loaders)

    @property
    def has_fixed_order(self) -> bool:
        """Whether a sampler gives the order that was drawn for one epoch until another one is drawn."""
        return self._order is not None

    def capture(self, inside_epoch: bool) -> dict[str, Any]:
        """The state between two batches.

        Args:
            inside_epoch: Whether more of the epoch's batches are to come.
        """
        # Without a length, the fetcher is one batch ahead to see whether there is one: the state from before that.
        ahead = self._ahead if inside_epoch and self._prefetches else None
        return {
            "loaders": self._loader_states() if ahead is None else ahead["loaders"],
            "lengths": self._lengths(),
            "begun_again": self._begun_again() if ahead is None else ahead["begun_again"],
            "fetch_random": None if ahead is None else ahead["random"],
            "generators": _generator_states(self.loaders),
            "validation_generators": _generator_states(self._validation_loaders),
            "order": self._order,
        }

    def restore(self, state: dict[str, Any], epoch: int, inside_epoch: bool) -> bool:
        """Go to a saved position. The global generators are used on the way: restore them afterwards.

        Args:
            state: What `capture` returned.
            epoch: The epoch that the position is in, or just after.
            inside_epoch: Whether more of that epoch's batches are to come.

        Returns:
            Whether there is such a position in this data. If not, the epoch begins again.
        """
        made_anew = not inside_epoch and self._trainer.fit_loop._should_reload_train_dl
        found = True
        if not made_anew:
            error: Exception | None = None
            try:
                if inside_epoch:
                    self._check_lengths(state, epoch)
                if state["loaders"]:
                    self._go_to(state, epoch, inside_epoch)
            except Exception as raised:  # a StopIteration would end the fit without a word
                error = raised
            # all ranks begin again, or none: they have to train as many batches, and one asks the others for the order
            if not self._trainer.strategy.reduce_boolean_decision(error is None, all=True):
                found = not inside_epoch
                self._begin_again(error, inside_epoch)
        _set_generators(self.loaders, state["generators"])
        if state["validation_generators"]:
            self._make_validation_loaders()
            _set_generators(self._validation_loaders, state["validation_generators"])
        return found

    def _check_lengths(self, state: dict[str, Any], epoch: int) -> None:
        """In batches of another size a number of samples is another number of batches."""
        for loader in self.loaders:
            _set_sampler_epoch(loader, epoch)  # some have epochs of different length
        before, now = state.get("lengths"), self._lengths()
        if before is not None and before != now:
            had, has = (", ".join("unknown" if n is None else str(n) for n in lengths) for lengths in (before, now))
            raise ValueError(f"an epoch had {had} batches and has {has}")

    def _lengths(self) -> list[int | None]:
        return [sized_len(loader) for loader in self.loaders]

    def _go_to(self, state: dict[str, Any], epoch: int, inside_epoch: bool) -> None:
        # What is at its end stays there, until Lightning begins the next epoch itself.
        states = [{**s, _FINISHED: False} if isinstance(s, dict) and _FINISHED in s else s for s in state["loaders"]]
        fetcher = self._trainer.fit_loop._data_fetcher
        for loader in self.loaders:
            _set_sampler_epoch(loader, epoch)
        self._keep_order(state["order"])
        self._trainer.fit_loop._combined_loader._load_state_dicts(states)
        self._iterate_without_fetching(fetcher)
        if state["begun_again"] is not None:
            self._trainer.fit_loop._combined_loader._iterator._consumed = list(state["begun_again"])
        if inside_epoch and self._prefetches:
            if state["fetch_random"] is not None:  # nobody had listened: the batch read ahead is lost, as in Lightning
                restore_random_state(state["fetch_random"])
            self._ahead = {name: state[name] for name in ("loaders", "begun_again")}
            self._ahead["random"] = state["fetch_random"]
            fetcher.batches.append(super(type(fetcher), fetcher).__next__())  # type: ignore[misc]

    def _begin_again(self, error: Exception | None, inside_epoch: bool) -> None:
        why = "on another rank" if error is None else f"{type(error).__name__}: {error}"
        rank_zero_warn(
            "The position in the training data could not be restored, because the data is not that of the checkpoint"
            f" ({why}). It starts from the beginning"
            + (", and the epoch under way begins again with its first batch." if inside_epoch else ".")
        )
        for loader in self.loaders:
            vars(loader)["next_iter_state"] = None  # a StatefulDataLoader that did not get through it keeps it
        self.before_epoch()
        iter(self._trainer.fit_loop._data_fetcher)

    def _make_validation_loaders(self) -> None:
        """As Lightning makes them when training starts, unless its first epoch has no validation."""
        trainer = self._trainer
        if trainer.val_dataloaders is None:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
            trainer.training = True

    def begin_first_epoch(self) -> None:
        """Iterate again where the order that Lightning began with could not be found again, or differs by rank."""
        if self._reorders:
            own = capture_random_state()
            self.before_epoch()
            iter(self._trainer.fit_loop._data_fetcher)
            restore_random_state(own)

    def before_epoch(self) -> None:
        """Called before the loaders' iterators for an epoch are made."""
        if not self._reorders:
            return
        generators = [_generator_states([loader]) for loader in self.loaders]
        order: OrderState = {"random": capture_random_state(), "generators": generators}
        if self._trainer.world_size > 1:  # each rank takes its share of one and the same order
            order = self._trainer.strategy.broadcast(order)
        self._keep_order(order)

    def _keep_order(self, order: OrderState | None) -> None:
        self._order = order
        if order is not None:
            for loader, generators in zip(self.loaders, order["generators"], strict=True):
                if not _order_is_known(loader):
                    _use_fixed_order(loader, order["random"], generators)

    def before_fetch(self) -> None:
        """Called before each batch is fetched."""
        if self._prefetches:
            self._ahead = {
                "loaders": copy.deepcopy(self._loader_states()),
                "begun_again": self._begun_again(),
                "random": capture_random_state(),
            }

    @property
    def _prefetches(self) -> bool:
        fetcher = self._trainer.fit_loop._data_fetcher
        return bool(getattr(fetcher, "prefetch_batches", 0)) and fetcher.length is None

    @property
    def _reorders(self) -> bool:
        return any(_is_stateful(loader) and not _order_is_known(loader) for loader in self.loaders)

    def _loader_states(self) -> list[Any]:
        states: list[Any] = self._trainer.fit_loop._combined_loader._state_dicts()
        return states

    def _begun_again(self) -> list[bool] | None:
        """Which of several loaders have been through and began again, waiting for the longest."""
        consumed = getattr(self._trainer.fit_loop._combined_loader._iterator, "_consumed", None)
        return None if consumed is None else list(consumed)

    @property
    def _validation_loaders(self) -> list[Any]:
        combined = self._trainer.fit_loop.epoch_loop.val_loop._combined_loader
        return [] if combined is None else list(combined.flattened)

    def _iterate_without_fetching(self, fetcher: Any) -> None:
        ahead = getattr(fetcher, "prefetch_batches", 0)
        fetcher.prefetch_batches = 0
        try:
            iter(fetcher)
        finally:
            fetcher.prefetch_batches = ahead


def training_iterator(trainer: Any) -> Any:
    """The iterator of the only training loader; None if there are several, or none yet.

    Args:
        trainer: A Trainer of either namespace.
    """
    combined = trainer.fit_loop._combined_loader
    mode = None if combined is None else combined._iterator
    iterators = [] if mode is None else mode.iterators
    return iterators[0] if combined is not None and len(combined.flattened) == len(iterators) == 1 else None


def _is_stateful(loader: Any) -> bool:
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


def _order_is_known(loader: Any) -> bool:
    """Whether a sampler can go on from the loader's state: it has one of its own, or draws no random numbers.

    Lightning's DistributedSamplerWrapper does neither. It deals out among ranks what each of them draws.
    """
    if _has_own_batches(loader):
        return False
    # Lightning puts its wrapper there and a placeholder into loader.sampler
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", getattr(loader, "sampler", None))
    if sampler is None or not hasattr(sampler, "__len__"):
        return True
    if isinstance(sampler, FixedOrder) or is_instance_by_name(sampler, "DistributedSamplerWrapper"):
        return False
    return (
        type(sampler).__module__.startswith("torchdata.")
        or _is_stateful(sampler)
        or is_instance_by_name(sampler, "SequentialSampler", "DistributedSampler", "_InfiniteConstantSampler")
    )


def _has_own_batches(loader: Any) -> bool:
    """Whether a batch sampler of the user's draws the order."""
    batches = getattr(loader, "batch_sampler", None)
    ours = isinstance(batches, FixedOrder)
    libraries = type(batches).__module__.startswith(("torch.", "torchdata."))
    return ours or (hasattr(batches, "__len__") and not libraries and not _is_stateful(batches))


class FixedOrder:
    """A sampler that gives the same order however often it is asked in one epoch.

    Args:
        sampler: Draws the order.
    """

    def __init__(self, sampler: Any) -> None:
        self.inner = sampler
        self.random: RandomState = {}
        self.generators: list[torch.Tensor] = []

    def __iter__(self) -> Iterator[Any]:
        own = capture_random_state()
        restore_random_state({**own, **{name: self.random[name] for name in ("python", "numpy", "torch")}})
        _set_generators([self.inner], self.generators)
        drawn = list(self.inner)
        restore_random_state(own)
        return iter(drawn)

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # while a copy is being made
            raise AttributeError(name)
        return getattr(self.inner, name)


def _use_fixed_order(loader: Any, random: RandomState, generators: list[torch.Tensor]) -> None:
    owner, name = loader, "sampler"
    if _has_own_batches(loader):
        name = "batch_sampler"
    elif loader.batch_sampler is not None:
        owner = loader.batch_sampler
    sampler = getattr(owner, name)
    if not isinstance(sampler, FixedOrder):
        sampler = vars(owner)[name] = FixedOrder(sampler)  # a DataLoader's own attributes cannot be set otherwise
    sampler.random, sampler.generators = random, generators


def _generators(loaders: list[Any]) -> Iterator[torch.Generator]:
    """The generators that order or seed the loaders' data, each once, always in the same order."""
    seen: set[int] = set()
    pending: list[Any] = list(loaders)
    while pending:
        owner = pending.pop(0)
        if owner is None or id(owner) in seen:
            continue
        seen.add(id(owner))
        if isinstance(owner, torch.Generator):
            yield owner
            continue
        pending += [getattr(owner, name, None) for name in ("generator", "sampler", "batch_sampler")]
        if isinstance(owner, FixedOrder):
            pending.append(owner.inner)
        # Lightning's DistributedSamplerWrapper holds the sampler that it wraps as its dataset's
        pending.append(getattr(getattr(owner, "dataset", None), "_sampler", None))


def _generator_states(loaders: list[Any]) -> list[torch.Tensor]:
    return [generator.get_state() for generator in _generators(loaders)]


def _set_generators(loaders: list[Any], states: list[torch.Tensor]) -> None:
    for generator, state in zip(_generators(loaders), states, strict=False):
        generator.set_state(state.cpu())
