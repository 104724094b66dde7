"""Where the training data is: the state of loaders, samplers and generators, per rank."""

from __future__ import annotations

import copy
from typing import Any

from lightning_fabric.utilities.data import sized_len

from lightning_stability import internals
from lightning_stability.checkpointing import elastic
from lightning_stability.checkpointing.passes import Passes, Position, Start, left_out_by_loading
from lightning_stability.checkpointing.samplers import (
    FixedOrder,
    OrderState,
    OwnState,
    capture_own,
    deals_out_anothers_order,
    has_positions,
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
        passes: What has followed its loaders since they were made; without it they have no position.
    """

    skips_by_loading = False
    """Whether the batches of data without a position are loaded once more, and left out."""

    def __init__(self, trainer: Any, passes: Passes) -> None:
        self._trainer, self._passes = trainer, passes
        self._order: OrderState | None = None
        self._ahead: dict[str, Any] | None = None
        self._were_held = False
        self._own_at_start = capture_own(self.loaders)

    @property
    def loaders(self) -> list[Any]:
        """The loaders, without what combines them."""
        return list(internals.combined_loader(self._trainer).flattened)

    @property
    def without_position(self) -> list[Any]:
        """The loaders whose position cannot be saved."""
        return [loader for loader in self.loaders if not is_stateful(loader) and not has_positions(loader)]

    @property
    def unknown_orders(self) -> list[str]:
        """What keeps an epoch's order from being drawn again, in a phrase each."""
        return [phrase for loader in self.loaders for phrase in unknown_orders(loader)]

    @property
    def delivers_as_it_likes(self) -> bool:
        """Whether batches come as workers finish them, and not as the sampler gave them."""
        loaders = [loader for loader in self.loaders if has_positions(loader)]
        return any(loader.num_workers > 0 and not getattr(loader, "in_order", True) for loader in loaders)

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
            "positions": self._positions() if ahead is None else ahead["positions"],
            "lengths": self._lengths(),
            "begun_again": self._begun_again() if ahead is None else ahead["begun_again"],
            "fetch_random": None if ahead is None else ahead["random"],
            "own": only_changed(capture_own(self.loaders), self._own_at_start),
            "validation_own": {**capture_own(self._validation_loaders), "attributes": []},
            "order": self._order,
        }

    def restore(self, state: dict[str, Any], epoch: int, inside_epoch: bool) -> int | None:
        """Go to a saved position. The global generators are used on the way: restore them afterwards.

        Args:
            state: What `capture` returned.
            epoch: The epoch that the position is in, or just after.
            inside_epoch: Whether more of that epoch's batches are to come.

        Returns:
            How many of the epoch's batches are over. None if there is no such position in this data: the epoch begins
            again.
        """
        done = internals.batches_of_epoch(self._trainer) if inside_epoch else 0
        made_anew = not inside_epoch and internals.loaders_are_due(self._trainer)
        self._were_held = self._passes.release()
        if not made_anew:
            error: Exception | None = None
            try:
                done = self._restore_loaders(state, epoch, inside_epoch, done)
            except Exception as raised:  # a StopIteration would end the fit without a word
                error = raised
            # all ranks begin again, or none: they have to train as many batches, and one asks the others for the order
            if not self._trainer.strategy.reduce_boolean_decision(error is None, all=True):
                self._begin_again(error, inside_epoch)
                return None if inside_epoch else 0
        restore_own(self.loaders, state["own"])
        if state["validation_own"]["generators"]:
            self._make_validation_loaders()
            restore_own(self._validation_loaders, state["validation_own"])
        return done

    def _restore_loaders(self, state: dict[str, Any], epoch: int, inside_epoch: bool, done: int) -> int:
        loaders, positions = self.loaders, state["positions"] or [None] * len(self.loaders)
        if inside_epoch:
            for loader in loaders:
                internals.set_sampler_epoch(loader, epoch)  # some have epochs of different length
            if len(positions) != len(loaders):
                raise ValueError(f"there were {len(positions)} training loaders and are {len(loaders)}")
            pairs = [(loader, position) for loader, position in zip(loaders, positions, strict=True) if position]
            if any(elastic.is_dealt_otherwise(p, loader, self._trainer.world_size) for loader, p in pairs):
                return self._deal_anew(state, positions)
            self._check_lengths(state)
        self._go_to(state, positions, epoch, inside_epoch)
        return done

    def _deal_anew(self, state: dict[str, Any], positions: list[Position | None]) -> int:
        """Deal out what is left of the epoch among the ranks of now, in batches of the size of now."""
        if not all(positions):
            raise elastic.NotDealtOut("the position of one of the loaders is not known")
        rank, ranks = self._trainer.global_rank, self._trainer.world_size
        dealt = [elastic.dealt_anew(p, one, rank, ranks) for p, one in zip(positions, self.loaders, strict=True) if p]
        self.before_epoch()  # so that the epochs after it are dealt out from one order
        for loader, (start, _) in zip(self.loaders, dealt, strict=True):
            self._passes.begin_at(loader, start)
        self._iterate_without_fetching(internals.data_fetcher(self._trainer))
        if state["begun_again"] is not None:
            internals.set_consumed(self._trainer, state["begun_again"])
        consumed = state["begun_again"] or [False] * len(dealt)
        batches = [count for (_, count), begun_again in zip(dealt, consumed, strict=True) if not begun_again]
        left = min(batches) if internals.ends_with_shortest(self._trainer) else max(batches)
        self._say_what_is_left([start for start, _ in dealt], left)
        return max(int(self._trainer.num_training_batches) - left, 0)

    def _say_what_is_left(self, starts: list[Start], batches: int) -> None:
        left = " and ".join(str(elastic.samples_left(start)) for start in starts)
        warn(
            f"The samples of the epoch that were not trained on yet ({left}) are dealt out anew, each once: {batches}"
            f" batches on each of {self._trainer.world_size} processes. From here on batches and random numbers are not"
            " those of the run that was interrupted."
        )

    def _check_lengths(self, state: dict[str, Any]) -> None:
        """Else a number of batches is another number of samples."""
        before, now = state.get("lengths"), self._lengths()
        if before is not None and before != now:
            had, has = (", ".join("unknown" if n is None else str(n) for n in lengths) for lengths in (before, now))
            raise ValueError(f"an epoch had {had} batches and has {has}")

    def _lengths(self) -> list[int | None]:
        return [sized_len(loader) for loader in self.loaders]

    def _positions(self) -> list[Position | None]:
        """Where the loaders are, and how many batches of each an epoch has, if not all."""
        limits = internals.limits(self._trainer)
        found = self._passes.positions(self.loaders)
        return [
            None if position is None else {**position, "limit": None if limit == float("inf") else int(limit)}
            for position, limit in zip(found, limits, strict=True)
        ]

    def _go_to(self, state: dict[str, Any], positions: list[Position | None], epoch: int, inside_epoch: bool) -> None:
        # What is at its end stays there, until Lightning begins the next epoch itself.
        states = [{**s, _FINISHED: False} if isinstance(s, dict) and _FINISHED in s else s for s in state["loaders"]]
        fetcher = internals.data_fetcher(self._trainer)
        for loader in self.loaders:
            internals.set_sampler_epoch(loader, epoch)
        self._keep_order(state["order"])
        starts = [self._begin_at(loader, p, inside_epoch) for loader, p in zip(self.loaders, positions, strict=True)]
        skip = inside_epoch and self.skips_by_loading
        if not states and not any(starts) and not (inside_epoch and self._were_held) and not skip:
            return
        self._load_states(states, positions)
        self._iterate_without_fetching(fetcher)
        if state["begun_again"] is not None:
            internals.set_consumed(self._trainer, state["begun_again"])
        self._leave_out_by_loading(starts, skip)
        if inside_epoch and self._prefetches:
            if state["fetch_random"] is not None:  # nobody had listened: the batch read ahead is lost, as in Lightning
                RandomState.from_state_dict(state["fetch_random"]).restore()
            self._ahead = {name: state[name] for name in ("loaders", "begun_again")}
            self._ahead["positions"] = positions
            self._ahead["random"] = state["fetch_random"]
            internals.fetch_ahead(fetcher)

    def _leave_out_by_loading(self, starts: list[Start | None], skip: bool) -> None:
        iterators, loaders = internals.iterators(internals.combined_loader(self._trainer)), self.loaders
        for iterator, loader, start in zip(iterators, loaders, starts, strict=True):
            if start is not None and start.how == "load":
                left_out_by_loading(iterator, start.position["batches"])
            elif start is None and skip and len(loaders) == 1 and not is_stateful(loader):
                left_out_by_loading(iterator, internals.batches_of_epoch(self._trainer))

    def _load_states(self, states: list[Any], positions: list[Position | None]) -> None:
        """Load the states of loaders that have some, unless they had been given other batches than their own."""
        stateful = [pair for pair in zip(self.loaders, positions, strict=True) if is_stateful(pair[0])]
        if len(stateful) != len(states):
            raise ValueError(f"{len(states)} training loaders had a state and {len(stateful)} have")
        for (loader, position), state in zip(stateful, states, strict=True):
            if position is None or position["dealt"] is None:
                loader.load_state_dict(state)

    def _begin_at(self, loader: Any, position: Position | None, inside_epoch: bool) -> Start | None:
        """Have a loader begin at its position, when it is next iterated over."""
        if position is None:
            if is_stateful(loader):
                self._passes.begin_at(loader, Start({"source": None}, "own state"))
            return None
        if not is_stateful(loader) and (inside_epoch or loader.persistent_workers):
            self._passes.use_base_seed(loader, position["base_seed"])
        if not inside_epoch:
            if is_stateful(loader) or not loader.persistent_workers:
                return None
            # the workers of before were there already: those of now are started here, and draw no random number later
            nothing = {**position, "batches": 0, "last": None, "dealt": None}
            self._passes.begin_at(loader, Start(nothing, rest=()))
            return Start(nothing, rest=())
        if position["dealt"] is not None:
            start = elastic.dealt_before(position, loader, self._trainer.global_rank)
        elif is_stateful(loader):
            start = Start(position, "own state")
        elif has_positions(loader):
            start = Start(position)
        elif self.skips_by_loading:
            start = Start(position, "load")
        else:
            return None
        self._passes.begin_at(loader, start)
        return start

    def _begin_again(self, error: Exception | None, inside_epoch: bool) -> None:
        why = "on another rank" if error is None else f"{type(error).__name__}: {error}"
        warn(
            "The position in the training data could not be restored, because the data is not that of the checkpoint"
            f" ({why}). It starts from the beginning"
            + (", and the epoch under way begins again with its first batch." if inside_epoch else ".")
        )
        for loader in self.loaders:
            vars(loader)["next_iter_state"] = None  # a StatefulDataLoader that did not get through it keeps it
        self._passes.forget()
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
                if own is not None and self._keeps_order(loader):
                    FixedOrder.of(loader).drawn_from = {"random": order["random"], "own": own}

    def _own_of_samplers(self) -> list[OwnState | None]:
        return [FixedOrder.of(loader).own_state() if self._keeps_order(loader) else None for loader in self.loaders]

    def before_fetch(self) -> None:
        """Called before each batch is fetched."""
        if self._prefetches:
            self._ahead = {
                "loaders": copy.deepcopy(self._loader_states()),
                "positions": self._positions(),
                "begun_again": self._begun_again(),
                "random": RandomState.capture().state_dict(),
            }

    @property
    def _prefetches(self) -> bool:
        fetcher = internals.data_fetcher(self._trainer)
        return bool(getattr(fetcher, "prefetch_batches", 0)) and fetcher.length is None

    @property
    def _reorders(self) -> bool:
        return any(self._keeps_order(loader) for loader in self.loaders)

    def _keeps_order(self, loader: Any) -> bool:
        """Whether the order of an epoch is drawn for a loader: it has a state, or ranks would draw each its own."""
        deals = self._trainer.world_size > 1 and has_positions(loader) and deals_out_anothers_order(loader)
        return (is_stateful(loader) or deals) and not order_is_known(loader)

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
