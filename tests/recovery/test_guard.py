"""A bad step leaves no trace: the run ends bit-equal to one in which that step was left out by hand."""

from typing import Any

import pytest
import torch

from lightning_stability import GradNormMonitor, NaNEarlyStop
from tests import runs
from tests.recovery import poison

GO_ON = 10**6


class Signed(torch.optim.Optimizer):
    """An optimizer of somebody's own, with a count of its own that every call advances."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "calls": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["calls"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=group["lr"] / group["calls"])
        return loss


OPTIMIZERS = {
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW for-loop": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, foreach=True),
    "SGD momentum fused": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.1, fused=True),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=1e-2, fused=True),
    "own": Signed,
}

# Batches are counted over the run: 6 an epoch.
PLACES = {
    "first": {0},
    "middle": {2},
    "last of the epoch": {5},
    "first of the second epoch": {6},
    "two in a row": {1, 2},
    "the first two": {0, 1},
    "the very last": {11},
}
KINDS = ["nan_input", "inf_loss", "nan_loss", "nan_gradient", "overflow"]


def compare(
    pl: Any, kinds: dict[int, str], optimizer: str = "AdamW foreach", patience: int = GO_ON, **options: Any
) -> dict[str, Any]:
    options.setdefault("plugins", None)
    results = []
    for by_hand in (False, True):
        module = poison.make_module(pl, kinds, OPTIMIZERS[optimizer], by_hand)
        callbacks = [] if by_hand else [NaNEarlyStop(patience=patience)]
        results.append(poison.fit(pl, module, callbacks, **options))
    assert poison.differences(*results) == []
    assert poison.nonfinite(results[0]["weights"]) == []
    return results[0]


@pytest.fixture(params=runs.NAMESPACES)
def pl(request: pytest.FixtureRequest) -> Any:
    return runs.load_namespace(request.param)


@pytest.fixture
def one() -> Any:
    return runs.load_namespace("pytorch_lightning")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_bad_leaves_no_trace(pl: Any, kind: str) -> None:
    compare(pl, {2: kind, 7: kind})


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("optimizer", ["AdamW foreach", "SGD momentum fused"])
def test_wherever_it_is(one: Any, place: str, optimizer: str) -> None:
    compare(one, dict.fromkeys(PLACES[place], "nan_input"), optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["nan_input", "nan_gradient"])
def test_with_every_optimizer_from_the_first_step(one: Any, optimizer: str, kind: str) -> None:
    compare(one, {0: kind, 3: kind}, optimizer)


@pytest.mark.parametrize("bad", [{0}, {1}, {2}, {4}, {5}, {0, 1}, {3, 4}], ids=str)
@pytest.mark.parametrize("kind", ["nan_input", "nan_gradient"])
def test_a_poisoned_window_is_dropped_whole(one: Any, bad: set[int], kind: str) -> None:
    """Windows of 4 batches, the second of an epoch is a short one of 2."""
    compare(one, dict.fromkeys(bad, kind), accumulate_grad_batches=4)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("optimizer", ["AdamW foreach", "AdamW fused"])
def test_with_clipping(one: Any, algorithm: str, optimizer: str) -> None:
    compare(
        one,
        {2: "nan_input", 4: "nan_gradient"},
        optimizer,
        gradient_clip_val=0.5,
        gradient_clip_algorithm=algorithm,
    )


def test_the_reference_itself_is_poisoned_without_the_guard(one: Any) -> None:
    module = poison.make_module(one, {2: "nan_input"}, OPTIMIZERS["AdamW foreach"], by_hand=False)
    result = poison.fit(one, module, [])
    assert {"net.head.weight", "net.encoder.1.running_mean"} <= set(poison.nonfinite(result["weights"]))


def test_a_clean_run_is_the_same_with_and_without_the_guard(pl: Any) -> None:
    results = []
    for callbacks in ([], [NaNEarlyStop(), GradNormMonitor()]):
        module = poison.make_module(pl, {}, OPTIMIZERS["AdamW foreach"], by_hand=False)
        results.append(poison.fit(pl, module, callbacks))
    assert poison.differences(*results) == []
