"""Where the training data is: the state of loaders, samplers and generators, per rank."""

from __future__ import annotations

import copy
from typing import Any

from lightning_fabric.utilities.data import sized_len

from lightning_stability import internals
from lightning_stability.checkpointing.samplers import (
    FixedOrder,
    OrderState,
    OwnState,
    capture_own,
    is_stateful,
    only_changed,
    order_is_known,
    restore_own,
    unknown_orders,
)
from lightning_stability.notices import warn
from lightning_stability.recovery.random_state import RandomState

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
        self._own_at_start = capture_own(self.loaders)

    @property
    def loaders(self) -> list[Any]:
        """The loaders, without what combines them."""
        return list(internals.combined_loader(self._trainer).flattened)

    @property
    def without_position(self) -> list[Any]:
        """The loaders whose position cannot be saved."""
        return [loader for loader in self.loaders if not is_stateful(loader)]

    @property
    def unknown_orders(self) -> list[str]:
        """What keeps an epoch's order from being drawn again, in a phrase each."""
        return [phrase for loader in self.loaders for phrase in unknown_orders(loader)]

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
            "own": only_changed(capture_own(self.loaders), self._own_at_start),
            "validation_own": {**capture_own(self._validation_loaders), "attributes": []},
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
        made_anew = not inside_epoch and internals.loaders_are_due(self._trainer)
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
        restore_own(self.loaders, state["own"])
        if state["validation_own"]["generators"]:
            self._make_validation_loaders()
            restore_own(self._validation_loaders, state["validation_own"])
        return found

    def _check_lengths(self, state: dict[str, Any], epoch: int) -> None:
        """In batches of another size a number of samples is another number of batches."""
        for loader in self.loaders:
            internals.set_sampler_epoch(loader, epoch)  # some have epochs of different length
        before, now = state.get("lengths"), self._lengths()
        if before is not None and before != now:
            had, has = (", ".join("unknown" if n is None else str(n) for n in lengths) for lengths in (before, now))
            raise ValueError(f"an epoch had {had} batches and has {has}")

    def _lengths(self) -> list[int | None]:
        return [sized_len(loader) for loader in self.loaders]

    def _go_to(self, state: dict[str, Any], epoch: int, inside_epoch: bool) -> None:
        # What is at its end stays there, until Lightning begins the next epoch itself.
        states = [{**s, _FINISHED: False} if isinstance(s, dict) and _FINISHED in s else s for s in state["loaders"]]
        fetcher = internals.data_fetcher(self._trainer)
        for loader in self.loaders:
            internals.set_sampler_epoch(loader, epoch)
        self._keep_order(state["order"])
        internals.load_loader_states(self._trainer, states)
        self._iterate_without_fetching(fetcher)
        if state["begun_again"] is not None:
            internals.set_consumed(self._trainer, state["begun_again"])
        if inside_epoch and self._prefetches:
            if state["fetch_random"] is not None:  # nobody had listened: the batch read ahead is lost, as in Lightning
                RandomState.from_state_dict(state["fetch_random"]).restore()
            self._ahead = {name: state[name] for name in ("loaders", "begun_again")}
            self._ahead["random"] = state["fetch_random"]
            internals.fetch_ahead(fetcher)

    def _begin_again(self, error: Exception | None, inside_epoch: bool) -> None:
        why = "on another rank" if error is None else f"{type(error).__name__}: {error}"
        warn(
            "The position in the training data could not be restored, because the data is not that of the checkpoint"
            f" ({why}). It starts from the beginning"
            + (", and the epoch under way begins again with its first batch." if inside_epoch else ".")
        )
        for loader in self.loaders:
            vars(loader)["next_iter_state"] = None  # a StatefulDataLoader that did not get through it keeps it
        self.before_epoch()
        iter(internals.data_fetcher(self._trainer))

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
            now = RandomState.capture()
            self.before_epoch()
            iter(internals.data_fetcher(self._trainer))
            now.restore()

    def before_epoch(self) -> None:
        """Called before the loaders' iterators for an epoch are made."""
        if not self._reorders:
            return
        order: OrderState = {"random": RandomState.capture().state_dict(), "own": self._own_of_samplers()}
        if self._trainer.world_size > 1:  # each rank takes its share of one and the same order
            order = self._trainer.strategy.broadcast(order)
        self._keep_order(order)

    def _keep_order(self, order: OrderState | None) -> None:
        self._order = order
        if order is not None:
            for loader, own in zip(self.loaders, order["own"], strict=True):
                if not order_is_known(loader):
                    FixedOrder.of(loader).drawn_from = {"random": order["random"], "own": own}

    def _own_of_samplers(self) -> list[OwnState | None]:
        return [None if order_is_known(loader) else FixedOrder.of(loader).own_state() for loader in self.loaders]

    def before_fetch(self) -> None:
        """Called before each batch is fetched."""
        if self._prefetches:
            self._ahead = {
                "loaders": copy.deepcopy(self._loader_states()),
                "begun_again": self._begun_again(),
                "random": RandomState.capture().state_dict(),
            }

    @property
    def _prefetches(self) -> bool:
        fetcher = internals.data_fetcher(self._trainer)
        return bool(getattr(fetcher, "prefetch_batches", 0)) and fetcher.length is None

    @property
    def _reorders(self) -> bool:
        return any(is_stateful(loader) and not order_is_known(loader) for loader in self.loaders)

    def _loader_states(self) -> list[Any]:
        return internals.loader_states(self._trainer)

    def _begun_again(self) -> list[bool] | None:
        """Which of several loaders have been through and began again, waiting for the longest."""
        return internals.consumed(self._trainer)

    @property
    def _validation_loaders(self) -> list[Any]:
        combined = internals.validation_loader(self._trainer)
        return [] if combined is None else list(combined.flattened)

    def _iterate_without_fetching(self, fetcher: Any) -> None:
        ahead = getattr(fetcher, "prefetch_batches", 0)
        fetcher.prefetch_batches = 0
        try:
            iter(fetcher)
        finally:
            fetcher.prefetch_batches = ahead


def training_iterator(trainer: Any) -> Any:
    """The iterator of the only training loader; None if there are several, or none yet."""
    combined = internals.combined_loader(trainer)
    iterators = [] if combined is None else internals.iterators(combined)
    return iterators[0] if combined is not None and len(combined.flattened) == len(iterators) == 1 else None
