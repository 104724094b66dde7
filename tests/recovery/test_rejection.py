"""A rejected batch leaves no trace: the run ends bit-equal to one in which its step was left out by hand."""

import itertools
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_stability import InputCheck, NaNEarlyStop, PrecisionFallback
from tests import runs
from tests.recovery import poison
from tests.recovery.test_guard import OPTIMIZERS, _ReadLate, _unscaled_before

pl = runs.load_namespace("pytorch_lightning")
SPOILT = {"too large": 1e6, "nan": torch.nan}


def data(bad: set[int], how: str, batches: int = 6) -> DataLoader:
    """As `poison.data`, with whole batches spoilt in the dataset itself."""
    torch.manual_seed(1)
    x = torch.randn(batches * 4, 6)
    for batch in bad:
        x[4 * batch + 1] *= SPOILT[how]
    return DataLoader(TensorDataset(x), batch_size=4)


def compare(
    bad: set[int], how: str, optimizer: str = "AdamW foreach", others: Any = (), namespace: Any = pl, **options: Any
) -> dict[str, Any]:
    """Batches `bad` of each epoch are bad; what the run with InputCheck comes to."""
    results = []
    for by_hand in (False, True):
        kinds = dict.fromkeys(bad | {batch + 6 for batch in bad}, "rejected") if by_hand else {}
        module = poison.make_module(namespace, kinds, OPTIMIZERS[optimizer], by_hand)
        callbacks = [] if by_hand else [*others, InputCheck(action="skip")]
        plugins = runs.fp16(namespace, init_scale=256.0) if options.get("fp16") else None
        if by_hand and plugins and "fused" in optimizer:
            module.configure_optimizers = _unscaled_before(module.configure_optimizers)
        kept = {name: value for name, value in options.items() if name != "fp16"}
        results.append(poison.fit(namespace, module, callbacks, data(bad, how), plugins=plugins, **kept))
    assert poison.differences(*results) == []
    assert poison.nonfinite(results[0]["weights"]) == []
    return results[0]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("namespace", "how"),
    [
        (runs.NAMESPACES[0], "nan"),
        (runs.NAMESPACES[1], "too large"),
        *(pytest.param(*case, marks=SLOW) for case in [(runs.NAMESPACES[0], "too large"), (runs.NAMESPACES[1], "nan")]),
    ],
)
def test_a_rejected_batch_leaves_no_trace(namespace: str, how: str) -> None:
    compare({2}, how, namespace=runs.load_namespace(namespace))


@pytest.mark.parametrize("optimizer", ["AdamW fused", "SGD momentum fused", "own"])
def test_with_every_kind_of_optimizer_from_the_first_step(optimizer: str) -> None:
    compare({0, 3}, "nan", optimizer)


@pytest.mark.parametrize("bad", [{1}, {5}, *(pytest.param(bad, marks=SLOW) for bad in ({1, 2}, {4}))], ids=str)
@pytest.mark.parametrize("optimizer", ["AdamW foreach", pytest.param("AdamW fused", marks=SLOW)])
def test_a_window_with_a_rejected_batch_is_dropped_whole(bad: set[int], optimizer: str) -> None:
    """Windows of 4 batches; the second of an epoch is a short one of 2."""
    compare(bad, "too large", optimizer, accumulate_grad_batches=4)


@pytest.mark.parametrize("how", ["nan", pytest.param("too large", marks=SLOW)])
@pytest.mark.parametrize("optimizer", ["AdamW foreach", "AdamW fused"])
def test_gradscaler_does_not_halve_its_scale_for_a_rejected_batch(how: str, optimizer: str) -> None:
    result = compare({2}, how, optimizer, fp16=True)
    assert result["precision"]["scale"] == 256.0


def test_without_rejection_gradscaler_would_have_halved() -> None:
    module = poison.make_module(pl, {}, OPTIMIZERS["AdamW foreach"], by_hand=False)
    plugins = runs.fp16(pl, init_scale=256.0)
    stop = NaNEarlyStop(patience=9)
    assert poison.fit(pl, module, [stop], data({2}, "nan"), plugins=plugins)["precision"]["scale"] < 256.0


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_neither_a_stop_nor_a_fallback_comes_of_a_rejected_batch(order: tuple[int, ...]) -> None:
    """Overflow in fp16 is what PrecisionFallback waits for, a NaN loss what NaNEarlyStop(patience=0) ends a run for."""
    stop, fallback, check = NaNEarlyStop(patience=0), PrecisionFallback(), InputCheck(action="skip")
    callbacks = [(stop, fallback, check)[place] for place in order]
    module = poison.make_module(pl, {}, OPTIMIZERS["AdamW foreach"], by_hand=False)
    plugins = runs.fp16(pl, init_scale=256.0)
    with pytest.warns(UserWarning, match="InputCheck"):
        result = poison.fit(pl, module, callbacks, data({2}, "too large"), plugins=plugins, max_epochs=1)
    assert result["step"] == 6
    assert str(result["trainer"].precision) == "16-mixed"
    assert stop.state_dict()["skipped_bad"] == 0
    assert stop.state_dict()["updates"] == 5
    assert check.state_dict()["counts"]["skipped"] == 1


@pytest.mark.parametrize("optimizer", ["AdamW foreach", "AdamW fused"])
def test_a_rejected_batch_neither_counts_in_a_row_of_bad_ones_nor_ends_it(optimizer: str) -> None:
    """Bad, rejected, bad: with patience 1 the second bad one ends the run; without the first it does not."""
    for kinds, steps in (({1: "inf_loss", 3: "inf_loss"}, 4), ({3: "inf_loss"}, 6)):
        module = poison.make_module(pl, kinds, OPTIMIZERS[optimizer], by_hand=False)
        callbacks = [InputCheck(action="skip"), NaNEarlyStop(patience=1)]
        with pytest.warns(UserWarning, match="InputCheck"):
            result = poison.fit(pl, module, callbacks, data({2}, "too large"), max_epochs=1)
        assert result["step"] == steps


@pytest.mark.parametrize(
    ("action", "fp16"),
    [
        ("warn", False),
        ("skip", True),
        *(pytest.param(*case, marks=SLOW) for case in [("warn", True), ("skip", False), ("raise", False)]),
    ],
)
def test_a_clean_run_is_the_same_with_and_without_the_check(action: str, fp16: bool) -> None:
    results = []
    for callbacks in ([], [InputCheck(action=action)]):
        module = poison.make_module(pl, {}, OPTIMIZERS["AdamW fused"], by_hand=False)
        plugins = runs.fp16(pl, init_scale=256.0) if fp16 else None
        results.append(poison.fit(pl, module, callbacks, plugins=plugins, accumulate_grad_batches=2))
    assert poison.differences(*results) == []


@pytest.mark.parametrize(("first", "how", "held"), [(None, "nan", False), (1, "too large", True)])
def test_the_count_on_the_device_passes_over_it_too(first: int | None, how: str, held: bool) -> None:
    """Batch 3 is bad; with patience 1 updates are held only if batch 1 was bad too, whatever batch 2 was."""
    kinds = dict.fromkeys({3} if first is None else {first, 3}, "inf_loss")
    module = poison.make_module(pl, kinds, OPTIMIZERS["AdamW fused"], by_hand=False)
    stop = NaNEarlyStop(patience=1)
    stop.automatic = True  # one that was asked for reads each step: it may have to explain it
    callbacks = [InputCheck(action="skip"), stop, _ReadLate(pl)]
    with pytest.warns(UserWarning, match="InputCheck"):
        poison.fit(pl, module, callbacks, data({2}, how, batches=9), max_epochs=1)
    assert (stop.state_dict()["held"] > 0) == held


@pytest.mark.parametrize(("use_pl_optimizer", "fused"), [(True, True), (False, False)])
def test_manual_optimization_skips_every_step_that_has_its_gradients(use_pl_optimizer: bool, fused: bool) -> None:
    """The first optimizer steps with each batch, twice; the second one with every second batch."""
    weights = []
    for by_hand in (False, True):
        module = _manual(use_pl_optimizer, fused, by_hand)
        callbacks = [] if by_hand else [InputCheck(action="skip")]
        trainer = runs.trainer(pl, callbacks=callbacks)
        trainer.fit(module, data({2}, "too large"))
        weights.append({"weights": dict(module.state_dict()), "o": [o.state_dict() for o in trainer.optimizers]})
    assert poison.differences(*weights) == []


def _manual(use_pl_optimizer: bool, fused: bool, by_hand: bool) -> Any:
    class Manual(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.automatic_optimization = False
            self.nets = torch.nn.ModuleList([torch.nn.Linear(6, 1), torch.nn.Linear(6, 1)])

        def training_step(self, batch: Any, batch_idx: int) -> None:
            often, seldom = self.optimizers(use_pl_optimizer)
            for _ in range(2):
                often.zero_grad()
                self.manual_backward(self.nets[0](batch[0]).pow(2).mean())
                if not (by_hand and batch_idx == 2):
                    often.step()
            self.manual_backward(self.nets[1](batch[0]).pow(2).mean())
            if batch_idx % 2:
                if not (by_hand and batch_idx == 3):
                    seldom.step()
                seldom.zero_grad()

        def configure_optimizers(self) -> Any:
            return [torch.optim.AdamW(net.parameters(), lr=1e-2, fused=fused) for net in self.nets]

    return Manual()


def test_a_step_without_a_loss_leaves_nothing_to_the_next_window() -> None:
    """Batch 2 is rejected and its `training_step` returns None: batch 3 is trained on."""
    check = InputCheck(action="skip")
    module = poison.make_module(pl, {}, OPTIMIZERS["AdamW foreach"], by_hand=False)
    step = type(module).training_step
    type(module).training_step = lambda self, batch, i: None if i == 2 else step(self, batch, i)
    stop = NaNEarlyStop(patience=0)
    poison.fit(pl, module, [check, stop], data({2}, "nan"), max_epochs=1)
    assert stop.state_dict()["updates"] == 5
    assert poison.nonfinite(dict(module.state_dict())) == []
