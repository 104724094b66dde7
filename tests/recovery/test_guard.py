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


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_bad_leaves_no_trace(pl: Any, kind: str) -> None:
    compare(pl, {2: kind, 7: kind})


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("optimizer", ["AdamW foreach", pytest.param("SGD momentum fused", marks=pytest.mark.slow)])
def test_wherever_it_is(one: Any, place: str, optimizer: str) -> None:
    compare(one, dict.fromkeys(PLACES[place], "nan_input"), optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", [pytest.param("nan_input", marks=pytest.mark.slow), "nan_gradient"])
def test_with_every_optimizer_from_the_first_step(one: Any, optimizer: str, kind: str) -> None:
    compare(one, {0: kind, 3: kind}, optimizer)


@pytest.mark.parametrize("bad", [{0}, {1}, {2}, {4}, {5}, {0, 1}, {3, 4}], ids=str)
@pytest.mark.parametrize("kind", ["nan_input", pytest.param("nan_gradient", marks=pytest.mark.slow)])
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
    for callbacks in ([], [NaNEarlyStop(patience=0), GradNormMonitor()]):
        module = poison.make_module(pl, {}, OPTIMIZERS["AdamW foreach"], by_hand=False)
        results.append(poison.fit(pl, module, callbacks))
    assert poison.differences(*results) == []


class TestWithGradScaler:
    """Real fp16 on the CPU."""

    @pytest.mark.parametrize("kind", ["nan_input", "inf_loss", "nan_gradient", "fp16_overflow"])
    @pytest.mark.parametrize("optimizer", ["AdamW foreach", "AdamW fused"])
    def test_both_decide_together(self, one: Any, kind: str, optimizer: str) -> None:
        results = []
        for by_hand in (False, True):
            module = poison.make_module(one, {2: kind, 7: kind}, OPTIMIZERS[optimizer], by_hand)
            if by_hand and "fused" in optimizer:
                # the same update, but one that GradScaler unscales beforehand
                module.configure_optimizers = _unscaled_before(module.configure_optimizers)
            callbacks = [] if by_hand else [NaNEarlyStop(patience=GO_ON)]
            results.append(poison.fit(one, module, callbacks, plugins=runs.fp16(one, init_scale=256.0)))
        assert poison.differences(*results) == []
        assert poison.nonfinite(results[0]["weights"]) == []
        halvings = {"inf_loss": 0}.get(kind, 2)
        assert results[0]["precision"]["scale"] == 256.0 / 2**halvings

    def test_an_ordinary_overflow_is_what_it_was_without_the_guard(self, pl: Any) -> None:
        """Scale 2^24 overflows in the backward pass alone: GradScaler halves it until it fits."""
        results = []
        for callbacks in ([], [NaNEarlyStop(patience=0)]):
            module = poison.make_module(pl, {}, OPTIMIZERS["AdamW foreach"], by_hand=False)
            results.append(poison.fit(pl, module, callbacks, plugins=runs.fp16(pl, init_scale=2.0**24)))
        assert results[0]["precision"]["scale"] < 2.0**24
        assert poison.differences(*results) == []

    def test_a_scale_that_collapses_ends_the_run(self, one: Any) -> None:
        kinds = dict.fromkeys(range(100), "fp16_overflow")
        module = poison.make_module(one, kinds, OPTIMIZERS["AdamW foreach"], by_hand=False)
        stop = NaNEarlyStop(patience=0)
        with pytest.warns(UserWarning, match=r"gradients overflow at every loss scale; it has fallen to 0\.5"):
            result = poison.fit(one, module, [stop], plugins=runs.fp16(one, init_scale=4.0))
        assert result["step"] == 4
        assert stop.state_dict()["skipped_by_scaler"] == 3

    def test_too_many_skips_in_a_row_end_the_run(self, one: Any) -> None:
        kinds = dict.fromkeys(range(1000), "fp16_overflow")
        module = poison.make_module(one, kinds, OPTIMIZERS["AdamW fused"], by_hand=False)
        with pytest.warns(UserWarning, match="overflow at every loss scale"):
            result = poison.fit(
                one, module, [NaNEarlyStop(patience=0)], plugins=runs.fp16(one, init_scale=2.0**40), max_epochs=9
            )
        assert result["step"] == 21


def _unscaled_before(configure: Any) -> Any:
    def configured() -> Any:
        made = configure()
        made["optimizer"]._step_supports_amp_scaling = False
        return made

    return configured


class TestWhoSpoilsIt:
    def compare(self, pl: Any, overrides: dict[str, Any], **options: Any) -> None:
        """`overrides` spoil batch 2 in one run; in the other that batch's step is left out by hand."""
        results = []
        for by_hand in (False, True):
            module = poison.make_module(pl, {2: "left_out"} if by_hand else {}, OPTIMIZERS["AdamW foreach"], by_hand)
            for name, method in overrides.items():
                if not by_hand:
                    setattr(type(module), name, method)
            results.append(poison.fit(pl, module, [] if by_hand else [NaNEarlyStop(patience=1)], **options))
        assert poison.differences(*results) == []

    def test_the_modules_own_hook_before_the_step(self, one: Any) -> None:
        def on_before_optimizer_step(self: Any, optimizer: Any) -> None:
            if self.batch == 2:
                self.net.head.weight.grad[0, 0] = torch.nan

        self.compare(one, {"on_before_optimizer_step": on_before_optimizer_step})

    def test_the_modules_own_clipping(self, one: Any) -> None:
        def configure_gradient_clipping(self: Any, optimizer: Any, **options: Any) -> None:
            if self.batch == 2:
                self.net.head.weight.grad[0, 0] = torch.inf

        self.compare(one, {"configure_gradient_clipping": configure_gradient_clipping})

    def test_the_modules_own_optimizer_step(self, one: Any) -> None:
        def optimizer_step(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
            def spoilt() -> Any:
                loss = closure()
                if self.batch == 2:
                    self.net.head.bias.grad.fill_(torch.nan)
                return loss

            optimizer.step(closure=spoilt)

        self.compare(one, {"optimizer_step": optimizer_step})


class TestManualOptimization:
    @pytest.mark.parametrize("use_pl_optimizer", [True, False])
    @pytest.mark.parametrize("fused", [True, False])
    @pytest.mark.parametrize("bad", ["first", "second"])
    def test_two_optimizers(self, pl: Any, use_pl_optimizer: bool, fused: bool, bad: str) -> None:
        results = []
        for by_hand in (False, True):
            module = self.make(pl, use_pl_optimizer, fused, bad, by_hand)
            results.append(poison.fit(pl, module, [] if by_hand else [NaNEarlyStop(patience=1)]))
        assert poison.differences(*results, path="") == []
        assert poison.nonfinite(results[0]["weights"]) == []

    def make(self, pl: Any, use_pl_optimizer: bool, fused: bool, bad: str, by_hand: bool) -> Any:
        class Two(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.automatic_optimization = False
                parts = (torch.nn.Linear(6, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.5), torch.nn.Linear(6, 1))
                self.net = torch.nn.ModuleDict({"first": torch.nn.Linear(6, 6), "second": torch.nn.Sequential(*parts)})
                self.epoch_metrics: list[Any] = []

            def training_step(self, batch: Any, batch_idx: int) -> None:
                for name, optimizer in zip(("first", "second"), self.optimizers(use_pl_optimizer), strict=True):
                    spoilt = name == bad and batch_idx == 2
                    before = {k: v.clone() for k, v in self.net.state_dict().items()}
                    x = batch[0] * torch.nan if spoilt else batch[0]
                    loss = self.net["second"](self.net["first"](x)).pow(2).mean()
                    optimizer.zero_grad()
                    self.manual_backward(loss)
                    if by_hand and spoilt:
                        self.net.load_state_dict(before)
                        if use_pl_optimizer:  # counted as a step, as GradScaler's skips are
                            optimizer._on_before_step()
                            optimizer._on_after_step()
                    else:
                        optimizer.step()

            def configure_optimizers(self) -> Any:
                return [torch.optim.AdamW(part.parameters(), lr=1e-2, fused=fused) for part in self.net.values()]

        return Two()


class TestWhatElseHappens:
    def test_a_training_step_without_a_loss(self, one: Any) -> None:
        def without(step: Any) -> Any:
            return lambda self, batch, batch_idx: None if batch_idx == 3 else step(self, batch, batch_idx)

        results = []
        for by_hand in (False, True):
            module = poison.make_module(one, {2: "nan_input"}, OPTIMIZERS["AdamW fused"], by_hand)
            type(module).training_step = without(type(module).training_step)
            results.append(poison.fit(one, module, [] if by_hand else [NaNEarlyStop(patience=1)]))
        assert poison.differences(*results) == []

    def test_an_optimizer_that_forgets_its_closure_is_refused_as_without_the_guard(self, pl: Any) -> None:
        class Forgets(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                return super().step()

        for callbacks in ([], [NaNEarlyStop(patience=0)]):
            module = runs.make_module(pl, optimizer=lambda module: Forgets(module.parameters(), lr=0.1))
            trainer = runs.trainer(pl, callbacks=callbacks)
            refusal = pl.utilities.exceptions.MisconfigurationException
            with pytest.raises(refusal, match="The closure hasn't been executed"):
                trainer.fit(module, runs.data())

    def test_an_optimizers_own_step_runs_its_closure_itself_and_a_bad_one_ends_it_there(self, one: Any) -> None:
        class Noted(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                order.append("step")
                loss = super().step(closure)
                order.append("stepped")
                return loss

        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            order.append("training_step")
            return self.net(batch[0] * (torch.nan if batch_idx == 1 else 1.0)).pow(2).mean()

        order: list[str] = []
        module = runs.make_module(
            one, optimizer=lambda module: Noted(module.parameters(), lr=0.1), training_step=training_step
        )
        runs.trainer(one, callbacks=[NaNEarlyStop(patience=1)], max_steps=3).fit(module, runs.data())
        whole = ["step", "training_step", "stepped"]
        assert order == [*whole, "step", "training_step", *whole]

    def test_an_optimizer_that_moves_the_weights_before_its_closure_is_refused(self, one: Any) -> None:
        class Ahead(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                with torch.no_grad():
                    self.param_groups[0]["params"][0].add_(0.1)
                return super().step(closure)

        module = runs.make_module(one, optimizer=lambda module: Ahead(module.parameters(), lr=0.1))
        refusal = one.utilities.exceptions.MisconfigurationException
        with pytest.raises(refusal, match=r"Ahead\.step moves the weights before it calls its closure"):
            runs.trainer(one, callbacks=[NaNEarlyStop(patience=0)]).fit(module, runs.data())

    def test_so_is_one_that_moves_them_by_what_its_first_update_has_made(self, one: Any) -> None:
        class Ahead(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                with torch.no_grad():
                    for weight, state in self.state.items():
                        weight.add_(state["momentum_buffer"], alpha=-0.1)
                return super().step(closure)

        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:  # the first update is skipped
            return self.net(batch[0] * (torch.nan if batch_idx == 0 else 1.0)).pow(2).mean()

        def optimizer(module: Any) -> Any:
            return Ahead(module.parameters(), lr=0.1, momentum=0.9)

        module = runs.make_module(one, optimizer=optimizer, training_step=training_step)
        refusal = one.utilities.exceptions.MisconfigurationException
        with pytest.raises(refusal, match=r"Ahead\.step moves the weights before it calls its closure"):
            runs.trainer(one, callbacks=[NaNEarlyStop(patience=3)]).fit(module, runs.data())

    def test_an_automatic_guard_that_leaves_in_the_midst_of_a_step_lets_it_be_made(self, one: Any) -> None:
        class Ahead(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                with torch.no_grad():
                    self.param_groups[0]["params"][0].add_(0.1)
                return super().step(closure)

        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]).pow(2).mean() * torch.nan

        module = runs.make_module(
            one, optimizer=lambda module: Ahead(module.parameters(), lr=0.1), training_step=training_step
        )
        automatic = NaNEarlyStop(patience=0)
        automatic.automatic = True
        with pytest.warns(UserWarning, match="disables itself"):
            runs.trainer(one, callbacks=[automatic], max_steps=1).fit(module, runs.data())
        assert any(weight.isnan().any() for weight in module.parameters()), "as without it"

    def test_a_validation_inside_a_window_sees_no_bad_buffer(self, one: Any) -> None:
        module = poison.make_module(one, {0: "nan_input"}, OPTIMIZERS["AdamW foreach"], by_hand=False)
        options = {"accumulate_grad_batches": 4, "val_check_interval": 2, "num_sanity_val_steps": 0}
        torch.manual_seed(2)
        trainer = runs.trainer(one, callbacks=[NaNEarlyStop(patience=1)], **options)
        trainer.fit(module, poison.data(), poison.data())
        assert len(module.validations) > 6
        assert all(module.validations)

    def test_weights_that_the_forward_pass_writes_are_given_back(self, one: Any) -> None:
        """Nothing names them: they are found by their version in the first batches."""

        class Renormed(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = torch.nn.Linear(6, 1)

            def forward(self, x: Any) -> Any:
                with torch.no_grad():
                    self.linear.weight.div_(self.linear.weight.norm() * (1 + x[0, 0] * 0))
                return self.linear(x)

        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            weights.append(self.net.linear.weight.detach().clone())
            return self.net(batch[0] * (torch.nan if batch_idx == 2 else 1.0)).pow(2).mean()

        weights: list[Any] = []
        module = runs.make_module(
            one, Renormed(), training_step=training_step, on_before_optimizer_step=lambda self, optimizer: None
        )
        runs.trainer(one, callbacks=[NaNEarlyStop(1)]).fit(module, runs.data())
        assert torch.equal(weights[3], weights[2])

    def test_an_update_is_held_on_the_device_until_the_host_has_read_of_the_stop(self, one: Any) -> None:
        """The host hears four steps late; weights are still those of the bad step."""
        results = []
        for late in (False, True):
            module = poison.make_module(one, {3: "nan_input"}, OPTIMIZERS["AdamW fused"], by_hand=False)
            callbacks: list[Any] = [NaNEarlyStop(patience=0)]
            callbacks[0].automatic = True  # one that was asked for reads each step: it may have to explain it
            if late:
                callbacks.append(_ReadLate(one))
            with pytest.warns(UserWarning, match="NaNEarlyStop ended the run"):
                results.append(poison.fit(one, module, callbacks, poison.data(9)))
        assert results[0]["step"] == 4
        assert results[1]["step"] == 8
        for name in ("weights", "optimizers"):
            found = poison.differences(results[1][name], results[0][name])
            assert [difference for difference in found if ".lr:" not in difference] == []

    def test_a_closure_that_is_asked_twice_is_run_twice_and_said(self, one: Any) -> None:
        class Twice(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                with torch.enable_grad():
                    closure()
                return super().step(closure)

        weights = []
        for callbacks in ([], [NaNEarlyStop(patience=0)]):
            module = poison.make_module(one, {}, lambda p: Twice(p, lr=0.1), by_hand=False)
            if callbacks:
                with pytest.warns(UserWarning, match="closure more than once"):
                    weights.append(poison.fit(one, module, callbacks)["weights"])
            else:
                weights.append(poison.fit(one, module, callbacks)["weights"])
        assert poison.differences(*weights) == []

    def test_the_optimizer_is_as_it_was_afterwards(self, one: Any) -> None:
        module = poison.make_module(one, {2: "nan_input"}, OPTIMIZERS["AdamW fused"], by_hand=False)
        made = []
        configure = module.configure_optimizers
        module.configure_optimizers = lambda: made.append(configure()) or made[0]
        before = None

        class Look(one.Callback):
            def on_fit_start(self, trainer: Any, module: Any) -> None:
                nonlocal before
                before = dict(vars(trainer.optimizers[0]))

        poison.fit(one, module, [NaNEarlyStop(patience=1), Look()])
        after = vars(made[0]["optimizer"])
        assert after["step"] == before["step"]
        assert not hasattr(made[0]["optimizer"], "found_inf")


def _ReadLate(pl: Any) -> Any:
    class ReadLate(pl.Callback):
        """The device is four steps behind: nothing arrives until then."""

        def on_train_start(self, trainer: Any, module: Any) -> None:
            from lightning_stability.runtime import session_of

            reads = session_of(trainer).pipeline.reads
            poll = reads.poll
            reads.poll = lambda: poll() if len(reads) > 4 and trainer.global_step >= 7 else None

    return ReadLate()
