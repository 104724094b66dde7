"""One session per Trainer and fit: who joins it, what it counts, and its two doors."""

import pickle
from typing import Any

import pytest
import torch

from lightning_stability import FractionalCheckpoint, GradNormMonitor, InputCheck, NaNEarlyStop, PrecisionFallback
from lightning_stability.callbacks.base import StabilityCallback
from lightning_stability.events import read_events
from lightning_stability.runtime import BadStep, Order, session_of
from tests import runs
from tests.recovery import poison


def fit(pl: Any, callbacks: list[Any], kinds: dict[int, str] | None = None, **options: Any) -> Any:
    module = poison.make_module(pl, kinds or {}, lambda p: torch.optim.AdamW(p, lr=1e-2), by_hand=False)
    trainer = runs.trainer(pl, callbacks=callbacks, **options)
    torch.manual_seed(2)
    trainer.fit(module, poison.data())
    return trainer


class TestJoining:
    def test_no_hook_of_a_callback_needs_super(self, pl: Any) -> None:
        class Silent(NaNEarlyStop):
            """Every hook is overridden, and hands nothing on."""

            def setup(self, *args: Any, **kwargs: Any) -> None: ...
            def on_fit_start(self, *args: Any, **kwargs: Any) -> None: ...
            def on_train_start(self, *args: Any, **kwargs: Any) -> None: ...
            def on_train_epoch_start(self, *args: Any, **kwargs: Any) -> None: ...
            def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None: ...
            def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None: ...
            def on_train_epoch_end(self, *args: Any, **kwargs: Any) -> None: ...
            def on_train_end(self, *args: Any, **kwargs: Any) -> None: ...
            def teardown(self, *args: Any, **kwargs: Any) -> None: ...

        trainer = fit(pl, [Silent()], {2: "nan_input"})
        assert poison.nonfinite(trainer.lightning_module.state_dict()) == []

    def test_the_users_list_is_the_trainers_again_after_the_fit(self, pl: Any) -> None:
        callbacks: list[Any] = [NaNEarlyStop()]
        trainer = runs.trainer(pl, callbacks=callbacks)
        theirs = trainer.callbacks
        trainer.fit(runs.make_module(pl), runs.data())
        assert trainer.callbacks is theirs
        assert session_of(trainer) is None
        assert callbacks[0].session is None

    def test_the_list_can_be_pickled_while_it_trains(self, pl: Any) -> None:
        seen = []

        class Pickle(pl.Callback):
            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                seen.append(pickle.loads(pickle.dumps(session_of(trainer))))

        runs.trainer(pl, callbacks=[NaNEarlyStop(), Pickle()], max_steps=1).fit(runs.make_module(pl), runs.data())
        assert [type(copy).__name__ for copy in seen] == ["Callback"]

    def test_policies_hear_of_a_step_in_their_order(self, pl: Any) -> None:
        heard: list[str] = []

        class Policy(StabilityCallback):
            def __init__(self, name: str, order: Order) -> None:
                self.name, self.order = name, order

            def on_record(self, record: Any) -> None:
                heard.append(self.name)

        names = {"stop": Order.STOP, "observe": Order.OBSERVE, "retry": Order.RETRY, "rewind": Order.REWIND}
        policies = [Policy(name, order) for name, order in names.items()]
        runs.trainer(pl, callbacks=policies, max_steps=1).fit(runs.make_module(pl), runs.data())
        assert heard == ["retry", "rewind", "stop", "observe"]


SKIPS = {
    "NaNEarlyStop": lambda: [NaNEarlyStop()],
    "PrecisionFallback": lambda: [PrecisionFallback()],
    "GradNormMonitor": lambda: [GradNormMonitor()],
    "InputCheck": lambda: [InputCheck(action="skip")],
    "all five": lambda: [
        NaNEarlyStop(), PrecisionFallback(), GradNormMonitor(), InputCheck(action="skip"), FractionalCheckpoint(),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SKIPS)
def test_every_callback_counts_the_same_skips(one: Any, tmp_path: Any, name: str) -> None:
    """GradScaler's, in real fp16 from a scale that is too high: whoever asks, the session writes them."""
    logger = one.loggers.CSVLogger(tmp_path)
    plugins = runs.fp16(one, init_scale=2.0**22)
    options = {"logger": logger, "plugins": plugins, "max_epochs": 2, "enable_checkpointing": name == "all five"}
    trainer = fit(one, SKIPS[name](), **options)
    skipped = [event for event in read_events(logger.log_dir) if event["event"] == "update_skipped"]
    assert [(event["by"], event["ordinary"]) for event in skipped] == [("GradScaler", True)] * len(skipped)
    assert len(skipped) == scaler_skips(one), name
    assert trainer.global_step == 12


def scaler_skips(pl: Any) -> int:
    """What a run without any callback skips."""
    trainer = fit(pl, [], plugins=runs.fp16(pl, init_scale=2.0**22), max_epochs=2)
    steps = {int(state["step"]) for state in trainer.optimizers[0].state.values()}
    return 12 - max(steps)


class TestDoors:
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_a_subscriber_is_shown_a_bad_step_whole(self, one: Any, accumulate: int) -> None:
        shown: list[Any] = []

        class Subscribe(NaNEarlyStop):
            def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
                super().setup(trainer, pl_module, stage)
                self.session.subscribe(self.look)

            def look(self, bad: BadStep) -> None:
                assert bad.window is not None
                batches = [batch.batch[0].clone() for batch in bad.window.batches]
                shown.append((bad.record, batches, [batch.random.cpu.clone() for batch in bad.window.batches]))

        fit(one, [Subscribe()], {4: "nan_input"}, accumulate_grad_batches=accumulate, max_epochs=1)
        [(record, batches, random_states)] = shown
        assert (record.outcome, record.batch_idx) == ("bad", 4)
        expected = [batch[0] for batch in poison.data()][4 : 4 + accumulate]
        assert all(map(torch.equal, batches, expected))
        assert len(random_states) == accumulate

    def test_an_earlier_state_is_restored_between_two_steps(self, one: Any) -> None:
        """The run that goes back to the state of step 2 at step 4 ends as one that trains on from it."""
        at: list[Any] = []

        class Back(NaNEarlyStop):
            def on_record(self, record: Any) -> None:
                trainer = self.session.trainer
                if record.step == 1:
                    self.session.between_steps(lambda: at.append(keep(trainer)))
                elif record.step == 3:
                    self.session.between_steps(lambda: restore(trainer, at[0]))

        def keep(trainer: Any) -> Any:
            module, [optimizer] = trainer.lightning_module, trainer.optimizers
            import copy

            return copy.deepcopy((module.state_dict(), optimizer.state_dict()))

        def restore(trainer: Any, kept: Any) -> None:
            trainer.lightning_module.load_state_dict(kept[0])
            trainer.optimizers[0].load_state_dict(kept[1])
            at.append({name: value.clone() for name, value in trainer.lightning_module.state_dict().items()})

        trainer = fit(one, [Back()], max_steps=4)
        assert len(at) == 2
        assert poison.differences(at[1], at[0][0]) == []
        assert poison.differences(dict(trainer.lightning_module.state_dict()), at[0][0]) == []
