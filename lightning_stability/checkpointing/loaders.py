"""Where the training data is: the state of loaders, samplers and generators, per rank.

The private names of Lightning's data fetcher and CombinedLoader are touched here alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from lightning_stability._compat import is_instance_by_name
from lightning_stability.checkpointing.random_state import RandomState, capture_random_state, restore_random_state

_FINISHED = "_iterator_finished"  # torchdata's key in the state of a StatefulDataLoader


class TrainingData:
    """The training data of one Trainer and rank.

    Args:
        trainer: A Trainer of either namespace, from `on_train_start` on.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._epoch_random: RandomState | None = None
        self._epoch_generators: list[torch.Tensor] = []
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

    def capture(self, inside_epoch: bool) -> dict[str, Any]:
        """The state between two batches.

        Args:
            inside_epoch: Whether more of the epoch's batches are to come.
        """
        # Without a length, the fetcher is one batch ahead to see whether there is one: the state from before that.
        ahead = self._ahead if inside_epoch and self._prefetches else None
        return {
            "loaders": self._loader_states() if ahead is None else ahead["loaders"],
            "fetch_random": None if ahead is None else ahead["random"],
            "generators": _generator_states(self.loaders),
            "epoch_random": self._epoch_random,
            "epoch_generators": self._epoch_generators,
        }

    def restore(self, state: dict[str, Any], epoch: int, inside_epoch: bool) -> None:
        """Go to a saved position. The global generators are used on the way: restore them afterwards.

        Args:
            state: What `capture` returned.
            epoch: The epoch that the position is in, or just after.
            inside_epoch: Whether more of that epoch's batches are to come.
        """
        states = state["loaders"]
        if states:
            fetcher = self._trainer.fit_loop._data_fetcher
            self._set_epoch(epoch)
            if state["epoch_random"] is not None:  # what orders the epoch, where the loader's own state does not say
                restore_random_state(state["epoch_random"])
                _set_generators(self.loaders, state["epoch_generators"])
            if not inside_epoch:  # stay at the end; Lightning begins the next epoch itself
                states = [{**s, _FINISHED: False} if isinstance(s, dict) and _FINISHED in s else s for s in states]
            self._trainer.fit_loop._combined_loader._load_state_dicts(states)
            self._iterate_without_fetching(fetcher)
            if inside_epoch and self._prefetches:
                if state["fetch_random"] is not None:
                    restore_random_state(state["fetch_random"])
                self._ahead = {"loaders": states, "random": state["fetch_random"]}
                fetcher.batches.append(super(type(fetcher), fetcher).__next__())
        _set_generators(self.loaders, state["generators"])
        self._epoch_random, self._epoch_generators = state["epoch_random"], state["epoch_generators"]

    def before_epoch(self) -> RandomState | None:
        """Called before the loaders' iterators for an epoch are made.

        Returns:
            The random state to go back to once they are, if they are made from one that all ranks share.
        """
        own = self._share_sampling() if self._samples_are_dealt_out else None
        self._epoch_random, self._epoch_generators = capture_random_state(), _generator_states(self.loaders)
        return own

    def begin_first_epoch(self) -> None:
        """Iterate again where the order that Lightning began with is not one that can be found again.

        That is where a sampler of the user's is asked anew after a resume, and where each rank would take its share
        of an order of its own.
        """
        if not (self._samples_are_dealt_out or any(_is_stateful(x) and not _order_is_known(x) for x in self.loaders)):
            return
        own = capture_random_state()
        self.before_epoch()
        iter(self._trainer.fit_loop._data_fetcher)
        restore_random_state(own)

    def before_fetch(self) -> None:
        """Called before each batch is fetched."""
        if self._prefetches:
            self._ahead = {"loaders": copy.deepcopy(self._loader_states()), "random": capture_random_state()}

    @property
    def _prefetches(self) -> bool:
        fetcher = self._trainer.fit_loop._data_fetcher
        return bool(getattr(fetcher, "prefetch_batches", 0)) and fetcher.length is None

    @property
    def _samples_are_dealt_out(self) -> bool:
        """Whether ranks take turns in an order that each of them makes for itself."""
        return self._trainer.world_size > 1 and any(
            is_instance_by_name(getattr(loader, "sampler", None), "DistributedSamplerWrapper")
            for loader in self.loaders
        )

    def _share_sampling(self) -> RandomState:
        """Give all ranks the first one's random state, so that they deal out one and the same order."""
        own = capture_random_state()
        shared = self._trainer.strategy.broadcast((own, _generator_states(self.loaders)))
        restore_random_state({**own, **{name: shared[0][name] for name in ("python", "numpy", "torch")}})
        _set_generators(self.loaders, shared[1])
        return own

    def _loader_states(self) -> list[Any]:
        states: list[Any] = self._trainer.fit_loop._combined_loader._state_dicts()
        return states

    def _iterate_without_fetching(self, fetcher: Any) -> None:
        ahead = getattr(fetcher, "prefetch_batches", 0)
        fetcher.prefetch_batches = 0
        try:
            iter(fetcher)
        finally:
            fetcher.prefetch_batches = ahead

    def _set_epoch(self, epoch: int) -> None:
        for loader in self.loaders:
            for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
                for candidate in (sampler, getattr(sampler, "sampler", None)):
                    if callable(set_epoch := getattr(candidate, "set_epoch", None)):
                        set_epoch(epoch)


def _is_stateful(loader: Any) -> bool:
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


def _order_is_known(loader: Any) -> bool:
    """Whether the loader's own state, or nothing at all, determines the order of its samples."""
    sampler = getattr(loader, "sampler", None)
    module = type(sampler).__module__
    return (
        sampler is None
        or module.startswith("torchdata.")
        or is_instance_by_name(sampler, "SequentialSampler", "_InfiniteConstantSampler")
        or (is_instance_by_name(sampler, "DistributedSampler") and not hasattr(sampler.dataset, "_sampler"))
    )


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
        # Lightning's DistributedSamplerWrapper holds the sampler that it wraps as its dataset's
        pending.append(getattr(getattr(owner, "dataset", None), "_sampler", None))


def _generator_states(loaders: list[Any]) -> list[torch.Tensor]:
    return [generator.get_state() for generator in _generators(loaders)]


def _set_generators(loaders: list[Any], states: list[torch.Tensor]) -> None:
    for generator, state in zip(_generators(loaders), states, strict=False):
        generator.set_state(state.cpu())
