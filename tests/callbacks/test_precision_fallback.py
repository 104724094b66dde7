"""PrecisionFallback: from the retried batch on, the run is the one whose precision was changed by hand before it."""

import contextlib
import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_stability import GradNormMonitor, NaNEarlyStop, PrecisionFallback
from lightning_stability._compat import MisconfigurationException
from lightning_stability.runtime import session_of
from tests import runs
from tests.recovery import poison

OPTIMIZERS = {
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "eps for fp16": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-3),
}


class Plain(nn.Module):
    """What fp16 weights can do on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.first(x))).squeeze(1)


def fp16_module(pl: Any, **overrides: Any) -> Any:
    quiet = {"on_before_optimizer_step": lambda self, optimizer: None}
    optimizer = lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, eps=1e-3)  # noqa: E731
    return runs.make_module(pl, optimizer=optimizer, **quiet, **overrides)


def change_by_hand(pl: Any, batch: int, to: str = "32-true") -> Any:
    """Changes the precision before the given batch of the run."""

    class Change(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            if module.batch + 1 == batch:
                precision = pl.plugins.precision
                plugin = precision.Precision() if to == "32-true" else precision.MixedPrecision("bf16-mixed", "cpu")
                runtime = session_of(trainer)
                if runtime is None:
                    trainer.strategy.precision_plugin = plugin
                else:
                    runtime.use_plugin(plugin)

    return Change()


def fallback_and_reference(
    pl: Any,
    kinds: dict[int, str],
    first_of_window: int,
    optimizer: str = "foreach",
    to: str = "32-true",
    **options: Any,
) -> list[dict[str, Any]]:
    results = []
    for by_hand in (False, True):
        module = poison.make_module(pl, kinds, OPTIMIZERS[optimizer], by_hand=False)
        callback = change_by_hand(pl, first_of_window, to) if by_hand else PrecisionFallback(to)
        plugins = runs.fp16(pl, init_scale=256.0)
        results.append(poison.fit(pl, module, [callback], plugins=plugins, **options))
    return results


def assert_same(results: list[dict[str, Any]], accumulate: int = 1) -> None:
    if accumulate > 1:  # what a callback did between the batches of the window, it did with the first try's buffers
        for result in results:
            del result["average"]
    assert poison.differences(*results) == []
    assert poison.nonfinite(results[0]["weights"]) == []
    for epoch in results[0]["metrics"]:
        assert all(torch.isfinite(torch.tensor(value)) for value in epoch.values())


class TestTheSameBatchAgain:
    @pytest.mark.parametrize("batch", [0, 2, 5, 6, 11], ids="batch {}".format)
    def test_wherever_it_is(self, pl: Any, batch: int) -> None:
        results = fallback_and_reference(pl, {batch: "large_input"}, batch)
        assert_same(results)
        assert results[0]["trainer"].precision == "32-true"
        assert results[0]["step"] == 12

    @pytest.mark.parametrize(("batch", "first"), [(0, 0), (2, 0), (3, 0), (4, 4), (5, 4), (7, 6)])
    def test_a_whole_window(self, one: Any, batch: int, first: int) -> None:
        """Windows of 4 batches; the second of an epoch is a short one of 2."""
        assert_same(fallback_and_reference(one, {batch: "large_input"}, first, accumulate_grad_batches=4), 4)

    def test_with_a_fused_optimizer(self, one: Any) -> None:
        assert_same(fallback_and_reference(one, {2: "large_input"}, 2, "fused"))

    @pytest.mark.parametrize("accumulate", [1, 4])
    def test_with_clipping(self, one: Any, accumulate: int) -> None:
        first = {1: 2, 4: 0}[accumulate]
        options = {"gradient_clip_val": 0.1, "accumulate_grad_batches": accumulate}
        assert_same(fallback_and_reference(one, {2: "large_input"}, first, **options), accumulate)

    def test_to_bf16(self, one: Any) -> None:
        results = fallback_and_reference(one, {2: "large_input"}, 2, to="bf16-mixed")
        assert_same(results)
        assert results[0]["trainer"].precision == "bf16-mixed"

    def test_from_fp16_weights(self, pl: Any) -> None:
        """Weights, buffers and the optimizer's state become fp32; the batch is as it was before the cast."""

        class Record(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 1)
                self.register_buffer("table", torch.ones(1))
                self.seen: list[Any] = []

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                self.seen.append((x.dtype, float(x.abs().max())))
                return self.last(self.norm(self.first(x)))

        x = torch.randn(8, 6)
        x[4] *= 1e6
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=2)
        module = runs.make_module(
            pl,
            Record(),
            optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, eps=1e-3),
            on_before_optimizer_step=lambda self, optimizer: None,
        )
        trainer = runs.trainer(pl, callbacks=[PrecisionFallback()], precision="16-true", gradient_clip_val=1.0)
        with pytest.warns(UserWarning, match="16-true cannot continue at epoch 0, batch 2"):
            trainer.fit(module, loader)
        assert {t.dtype for t in module.state_dict().values()} == {torch.float32}
        states = trainer.optimizers[0].state.values()
        assert {state["exp_avg"].dtype for state in states} == {torch.float32}
        assert [dtype for dtype, _ in module.net.seen] == [torch.float16] * 3 + [torch.float32] * 2
        assert module.net.seen[3][1] == pytest.approx(float(x[4].abs().max()))
        assert trainer.global_step == 4

    @pytest.mark.parametrize("kind", ["manual", "in place"])
    def test_from_fp16_weights_without_another_try(self, one: Any, kind: str) -> None:
        """The next batch is cast before its step begins: the change has to come before that."""

        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            x = batch[0].mul_(1e6) if batch_idx == 1 and kind == "in place" else batch[0]
            loss = self.net(x * (1e6 if batch_idx == 1 else 1.0)).float().pow(2).mean()
            if kind == "in place":
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            return optimizer.step()

        module = fp16_module(one, training_step=training_step)
        module.automatic_optimization = kind == "in place"
        trainer = runs.trainer(one, callbacks=[PrecisionFallback()], precision="16-true")
        trainer.fit(module, runs.data())
        assert trainer.precision == "32-true"
        assert {value.dtype for value in module.state_dict().values()} == {torch.float32}
        assert not poison.nonfinite(module.state_dict())

    @pytest.mark.parametrize("precision", ["16-true", "16-mixed"])
    def test_each_batch_of_a_window_has_its_random_numbers_again(self, one: Any, precision: str) -> None:
        """Augmentation draws some between two batches; where a batch is cast anew, its hooks run again."""
        seen: list[Any] = []

        def on_after_batch_transfer(self: Any, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] + torch.rand(batch[0].shape).to(batch[0].dtype)]

        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            seen.append((batch_idx, batch[0].double(), torch.rand(1, dtype=torch.float32)))
            return self.net(batch[0] * (1e6 if batch_idx in (1, 2) else 1.0)).float().pow(2).mean()

        hooks = {"training_step": training_step, "on_after_batch_transfer": on_after_batch_transfer}
        options = {"plugins": runs.fp16(one)} if precision == "16-mixed" else {"precision": precision}
        trainer = runs.trainer(one, callbacks=[PrecisionFallback()], accumulate_grad_batches=3, **options)
        trainer.fit(fp16_module(one, **hooks), runs.data())
        assert trainer.precision == "32-true"
        assert [index for index, *_ in seen] == [0, 1, 2, 0, 1, 2, 3]
        for (_, first, drawn), (_, second, again) in zip(seen[:3], seen[3:6], strict=True):
            torch.testing.assert_close(second, first, rtol=0, atol=4e-3 if precision == "16-true" else 0)
            assert drawn == again

    @pytest.mark.parametrize("accumulate", [1, 4])
    def test_with_augmentation_in_the_main_process(self, one: Any, accumulate: int) -> None:
        class Noisy(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return 24

            def __getitem__(self, index: int) -> list[torch.Tensor]:
                return [torch.randn(6)]

        loader = torch.utils.data.DataLoader(Noisy(), batch_size=4, shuffle=True)
        options = {"accumulate_grad_batches": accumulate, "loader": loader}
        assert_same(fallback_and_reference(one, {2: "large_input"}, 2 if accumulate == 1 else 0, **options), accumulate)

    def test_the_module_says_which_type_it_has(self, one: Any) -> None:
        said: list[Any] = []

        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            said.append(self.dtype)
            x = batch[0] * (1e6 if batch_idx == 2 else 1.0)
            return self.net(x + torch.ones(6, dtype=self.dtype)).float().mean()

        module = fp16_module(one, training_step=training_step)
        runs.trainer(one, callbacks=[PrecisionFallback()], precision="16-true").fit(module, runs.data())
        assert said == [torch.float16] * 3 + [torch.float32] * 2

    def test_metrics_of_fp16_become_fp32(self, one: Any) -> None:
        """Sums of an epoch go beyond what fp16 holds long before anything is wrong."""
        module = poison.make_module(one, {2: "large_input"}, OPTIMIZERS["eps for fp16"], by_hand=False, net=Plain)
        poison.fit(one, module, [PrecisionFallback()], precision="16-true")
        module.mean.update(torch.tensor(1e9))
        assert float(module.mean.compute()) == 1e9

    def test_if_that_does_not_help_fp16_is_what_it_was(self, one: Any) -> None:
        """Weights, averages, metrics and the optimizer's state are the fp16 ones to the last bit."""
        results = []
        for callbacks in ([NaNEarlyStop(9)], [PrecisionFallback(), NaNEarlyStop(9)]):
            module = poison.make_module(one, {2: "nan_input", 7: "inf_loss"}, OPTIMIZERS["eps for fp16"], False, Plain)
            results.append(poison.fit(one, module, callbacks, precision="16-true"))
            assert module.dtype == torch.float16
        assert poison.differences(*results) == []
        assert {value.dtype for value in results[1]["weights"].values()} == {torch.float16}

    def test_a_loss_scale_that_collapses(self, one: Any) -> None:
        """Gradients that overflow at every scale in fp16, and do not in fp32."""

        class Steep(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
                return gradient * torch.inf if gradient.dtype == torch.float16 else gradient

        class Net(poison.Net):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return Steep.apply(super().forward(x))

        module = poison.make_module(one, {}, OPTIMIZERS["foreach"], by_hand=False, net=Net)
        plugins = runs.fp16(one, init_scale=8.0)
        with pytest.warns(UserWarning, match=r"every loss scale, which has fallen to 0\.5"):
            result = poison.fit(one, module, [PrecisionFallback()], plugins=plugins)
        assert result["trainer"].precision == "32-true"
        assert result["step"] == 12
        assert not poison.nonfinite(result["weights"])


class TestHooks:
    @pytest.mark.parametrize("accumulate", [1, 4])
    def test_what_surrounds_the_step_sees_one(self, one: Any, accumulate: int) -> None:
        """Also Lightning's own counters, and averages that are updated in `on_before_zero_grad`."""
        results = []
        for by_hand in (False, True):
            calls: list[str] = []

            class Note(one.callbacks.Callback):
                def __getattribute__(self, name: str, calls: Any = calls) -> Any:
                    hooks = ("on_train_batch_start", "on_train_batch_end", "on_before_zero_grad")
                    return (lambda *args: calls.append(name)) if name in hooks else super().__getattribute__(name)

            module = poison.make_module(one, {2: "large_input"}, OPTIMIZERS["foreach"], by_hand=False)
            callback = change_by_hand(one, 2 if accumulate == 1 else 0) if by_hand else PrecisionFallback()
            options = {"plugins": runs.fp16(one, init_scale=256.0), "accumulate_grad_batches": accumulate}
            result = poison.fit(one, module, [callback, Note()], **options)
            results.append([calls, result["trainer"].fit_loop.state_dict()])
        assert results[0][0].count("on_before_zero_grad") == (12 if accumulate == 1 else 4)
        assert poison.differences(*results) == []

    def test_the_gradient_norm_is_logged_once_and_is_the_retried_steps(self, one: Any) -> None:
        rows = []
        for callback in (PrecisionFallback(), change_by_hand(one, 2)):
            logger = runs.memory_logger(one)
            module = poison.make_module(one, {2: "large_input"}, OPTIMIZERS["foreach"], by_hand=False)
            plugins = runs.fp16(one, init_scale=256.0)
            poison.fit(one, module, [callback, GradNormMonitor()], plugins=plugins, logger=logger)
            rows.append([(step, row) for step, row in logger.rows if "grad_norm/total" in row])
        assert rows[0] == rows[1]
        assert [step for step, _ in rows[0]] == list(range(12))
        assert rows[0][-1][1]["grad_norm/nonfinite_steps"] == 0.0


class TestAfterTheChange:
    def test_the_run_is_its_own(self, one: Any) -> None:
        """As a run in fp32 from the start: no hook is left, and what is not finite lands as it would."""

        class Look(one.callbacks.Callback):
            seen: list[bool] = []  # noqa: RUF012

            def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
                self.seen.append(session_of(trainer).watch.is_hooked)

        module = poison.make_module(one, {2: "large_input", 9: "nan_input"}, OPTIMIZERS["foreach"], by_hand=False)
        result = poison.fit(one, module, [PrecisionFallback(), Look()], plugins=runs.fp16(one, init_scale=256.0))
        assert Look.seen == [True] * 3 + [False] * 9
        assert "optimizer_step" not in vars(result["trainer"].precision_plugin)
        assert poison.nonfinite(result["weights"])

    def test_others_stay_and_the_guard_with_those_that_want_it(self, one: Any) -> None:
        for others, landed in (([GradNormMonitor()], True), ([NaNEarlyStop(9)], False)):
            module = poison.make_module(one, {2: "large_input", 9: "nan_input"}, OPTIMIZERS["foreach"], by_hand=False)
            logger = runs.memory_logger(one)
            callbacks = [*others, PrecisionFallback()]
            result = poison.fit(one, module, callbacks, plugins=runs.fp16(one, init_scale=256.0), logger=logger)
            assert bool(poison.nonfinite(result["weights"])) is landed
            key = "grad_norm/nonfinite_steps" if landed else "skipped_updates"
            assert [row[key] for _, row in logger.rows if key in row][-1] >= 1

    def test_an_error_in_the_second_try_leaves_no_hook_in_the_module(self, one: Any) -> None:
        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2 and not torch.is_autocast_enabled("cpu"):
                raise ArithmeticError("of the model's own")
            return self.net(batch[0] * (1e6 if batch_idx == 2 else 1.0)).float().pow(2).mean()

        module = fp16_module(one, training_step=training_step)
        trainer = runs.trainer(one, callbacks=[PrecisionFallback()], plugins=runs.fp16(one))
        with pytest.raises(ArithmeticError, match="of the model's own"):
            trainer.fit(module, runs.data())
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.net.modules())


class TestWhenPrecisionIsNotTheCause:
    @pytest.mark.parametrize("kind", ["nan_input", "inf_loss", "nan_gradient"])
    def test_the_run_goes_on_as_it_was_and_the_guard_takes_over(self, one: Any, kind: str) -> None:
        results = []
        for callbacks in ([NaNEarlyStop(9)], [PrecisionFallback(), NaNEarlyStop(9)]):
            module = poison.make_module(one, {2: kind, 7: kind}, OPTIMIZERS["foreach"], by_hand=False)
            plugins = runs.fp16(one, init_scale=256.0)
            results.append(poison.fit(one, module, callbacks, plugins=plugins))
        assert poison.differences(*results) == []
        assert results[1]["trainer"].precision == "16-mixed"

    @pytest.mark.parametrize("kind", ["nan_input", "nan_gradient"])
    @pytest.mark.parametrize("accumulate", [1, 4])
    def test_a_try_in_vain_leaves_nothing(self, one: Any, accumulate: int, kind: str) -> None:
        """The window's good batches ran in fp32 as well, which rounds what they write otherwise."""
        results = []
        for callbacks in ([PrecisionFallback(), NaNEarlyStop(patience=1)], [NaNEarlyStop(patience=1)]):
            module = poison.make_module(one, {2: kind}, OPTIMIZERS["foreach"], by_hand=False)
            options = {"plugins": runs.fp16(one, init_scale=256.0), "accumulate_grad_batches": accumulate}
            results.append(poison.fit(one, module, callbacks, **options))
        assert str(results[0]["trainer"].precision) == "16-mixed"
        assert_same(results, accumulate)

    def test_it_says_so(self, one: Any, tmp_path: Path) -> None:
        logger = one.loggers.CSVLogger(tmp_path)
        module = poison.make_module(one, {2: "nan_input"}, OPTIMIZERS["foreach"], by_hand=False)
        callbacks = [PrecisionFallback(), NaNEarlyStop(patience=0)]
        with pytest.warns(UserWarning, match="16-mixed was not the cause"):
            poison.fit(one, module, callbacks, plugins=runs.fp16(one), logger=logger)
        names = [event["event"] for event in runs.incidents(logger.log_dir)]
        assert names[-3:] == ["precision_kept", "update_skipped", "training_stopped"]


class TestWhatIsOrdinary:
    def test_a_healthy_run_is_left_alone(self, pl: Any) -> None:
        """Scale 2^24 overflows at first, which GradScaler answers."""
        results = []
        for callbacks in ([], [PrecisionFallback()]):
            module = poison.make_module(pl, {}, OPTIMIZERS["foreach"], by_hand=False)
            plugins = runs.fp16(pl, init_scale=2.0**24)
            results.append(poison.fit(pl, module, callbacks, plugins=plugins))
        assert poison.differences(*results) == []
        assert results[0]["precision"]["scale"] < 2.0**24

    @pytest.mark.slow
    def test_a_thousand_steps_of_a_healthy_run(self, one: Any) -> None:
        module = poison.make_module(one, {}, OPTIMIZERS["foreach"], by_hand=False)
        result = poison.fit(one, module, [PrecisionFallback()], poison.data(500), plugins=runs.fp16(one))
        assert result["step"] == 1000
        assert result["trainer"].precision == "16-mixed"

    def test_in_fp32_it_does_nothing(self, one: Any) -> None:
        module = poison.make_module(one, {2: "nan_input"}, OPTIMIZERS["foreach"], by_hand=False)
        result = poison.fit(one, module, [PrecisionFallback()])
        assert poison.nonfinite(result["weights"])  # it is no guard by itself there


class TestTogether:
    def test_after_the_change_the_guard_goes_on(self, one: Any) -> None:
        results = []
        for by_hand in (False, True):
            module = poison.make_module(one, {2: "large_input", 8: "nan_input"}, OPTIMIZERS["fused"], by_hand)
            callbacks = [change_by_hand(one, 2)] if by_hand else [PrecisionFallback(), NaNEarlyStop(1)]
            results.append(poison.fit(one, module, callbacks, plugins=runs.fp16(one, init_scale=256.0)))
        assert poison.differences(*results) == []

    def test_manual_optimization_changes_from_the_next_step_on(self, one: Any) -> None:
        def training_step(self: Any, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.net(batch[0] * (1e6 if batch_idx == 1 else 1.0)).float().pow(2).mean())
            optimizer.step()

        module = runs.make_module(
            one, training_step=training_step, on_before_optimizer_step=lambda self, optimizer: None
        )
        module.automatic_optimization = False
        trainer = runs.trainer(one, callbacks=[PrecisionFallback()], plugins=runs.fp16(one))
        with pytest.warns(UserWarning, match="this batch is not trained again: manual optimization"):
            trainer.fit(module, runs.data())
        assert trainer.precision == "32-true"
        assert not poison.nonfinite(module.state_dict())

    def test_a_try_in_vain_logs_nothing(self, one: Any) -> None:
        logged: list[dict[str, float]] = []

        def training_step(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
            narrow = float(torch.is_autocast_enabled("cpu"))
            self.log("by_step", narrow)
            self.log("both", narrow, on_step=True, on_epoch=True)
            return self.net(batch[0]).float().pow(2).mean() * (torch.nan if batch_idx == 1 else 1.0)

        def on_train_batch_end(self: Any, *args: Any) -> None:
            logged.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})

        module = runs.make_module(one, training_step=training_step, on_train_batch_end=on_train_batch_end)
        callbacks = [PrecisionFallback(), NaNEarlyStop(patience=1)]
        runs.trainer(one, callbacks=callbacks, plugins=runs.fp16(one)).fit(module, runs.data())
        assert {(values["by_step"], values["both_step"]) for values in logged} == {(1.0, 1.0)}

    @pytest.mark.parametrize("manual", [True, False], ids=["manual", "in place"])
    def test_nor_changes_it_the_precision_for_a_batch_that_is_not_finite_itself(self, one: Any, manual: bool) -> None:
        def training_step(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 1:
                batch[0][0, 0] = torch.nan
            x = batch[0] if manual else batch[0].mul_(0.5)
            loss = self.net(x).float().pow(2).mean()
            if manual:
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()
            return loss

        module = runs.make_module(
            one, training_step=training_step, on_before_optimizer_step=lambda self, optimizer: None
        )
        module.automatic_optimization = not manual
        callbacks = [NaNEarlyStop(patience=1), PrecisionFallback()]
        trainer = runs.trainer(one, callbacks=callbacks, plugins=runs.fp16(one))
        with pytest.warns(UserWarning, match=r"not finite, and `batch\[0\]` was so before: 16-mixed was not the cause"):
            trainer.fit(module, runs.data())
        assert trainer.precision == "16-mixed"
        assert not poison.nonfinite(module.state_dict())

    def test_a_batch_that_was_changed_in_place_is_not_trained_again(self, one: Any) -> None:
        def training_step(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.net(batch[0].mul_(1e6 if batch_idx == 1 else 1.0)).float().pow(2).mean()

        module = runs.make_module(
            one, training_step=training_step, on_before_optimizer_step=lambda self, optimizer: None
        )
        trainer = runs.trainer(one, callbacks=[PrecisionFallback()], plugins=runs.fp16(one))
        with pytest.warns(UserWarning, match="changes its batch in place"):
            trainer.fit(module, runs.data())
        assert trainer.precision == "32-true"


@pytest.mark.parametrize("callback", [PrecisionFallback, NaNEarlyStop], ids=lambda c: c.__name__)
def test_a_scripted_part_is_given_back_what_it_wrote(one: Any, callback: Any) -> None:
    """Its buffers are in no dict, and it calls no hooks."""
    results = []
    for scripted in (True, False):
        torch.manual_seed(0)
        part = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        net = nn.Sequential(nn.Linear(6, 8), torch.jit.script(part) if scripted else part, nn.Linear(8, 1))

        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0] * (1e6 if batch_idx == 2 else 1.0)).float().pow(2).mean()

        module = fp16_module(one, net=net, training_step=training_step)
        made = callback(**({"patience": 1} if callback is NaNEarlyStop else {}))
        runs.trainer(one, callbacks=[made], plugins=runs.fp16(one, init_scale=256.0)).fit(module, runs.data(20, 4))
        results.append(dict(module.state_dict()))
    assert poison.differences(*results) == []
    assert poison.nonfinite(results[0]) == []


class TestCompiled:
    """Another precision is another graph: it is compiled once more, and nothing else is different."""

    @pytest.mark.slow
    @pytest.mark.parametrize(("backend", "whole"), [("eager", True), ("eager", False), ("inductor", False)])
    def test_it_is_the_run_whose_precision_was_changed_by_hand(self, one: Any, backend: str, whole: bool) -> None:
        if backend == "inductor" and not shutil.which("g++"):
            pytest.skip("inductor needs a compiler")
        results = []
        for by_hand in (False, True):
            torch._dynamo.reset()

            def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
                net = self.net if whole else self.fast
                return net(batch[0] * (1e6 if batch_idx == 2 else 1.0)).float().pow(2).mean()

            class Change(one.callbacks.Callback):
                def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
                    if batch_idx == 2:
                        trainer.strategy.precision_plugin = one.plugins.precision.Precision()

            module = fp16_module(one, training_step=training_step)
            object.__setattr__(module, "fast", torch.compile(module.net, backend=backend))
            callbacks = [Change() if by_hand else PrecisionFallback()]
            trainer = runs.trainer(one, callbacks=callbacks, plugins=runs.fp16(one, init_scale=256.0))
            fitted = torch.compile(module, backend=backend) if whole else module
            said = r"16-mixed cannot continue .* compiled once more" if whole else "16-mixed cannot continue"
            with contextlib.nullcontext() if by_hand else pytest.warns(UserWarning, match=said):
                trainer.fit(fitted, runs.data(20))
            assert trainer.precision == "32-true"
            results.append(dict(module.state_dict()))
        assert poison.differences(*results) == []


class TestWhatItSays:
    def test_the_logger_shows_the_change_and_the_end_of_fit_says_where_and_why(
        self, one: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        logger = runs.memory_logger(one)
        module = poison.make_module(one, {5: "large_input"}, OPTIMIZERS["foreach"], by_hand=False)
        options = {"plugins": runs.fp16(one, init_scale=256.0), "logger": logger, "log_every_n_steps": 2}
        with caplog.at_level("INFO", "pytorch_lightning.utilities.rank_zero"):
            result = poison.fit(one, module, [PrecisionFallback()], **options)
        assert result["trainer"].precision == "32-true"
        kept = [(step, row) for step, row in logger.rows if "precision_bits" in row]
        rows = [(step, row["precision_bits"], row.get("loss_scale")) for step, row in kept]
        assert rows == [
            (0, 16.0, 256.0), (1, 16.0, 256.0), (3, 16.0, 256.0),
            (5, 32.0, 1.0), (7, 32.0, None), (9, 32.0, None), (11, 32.0, None),
        ]  # fmt: skip
        said = [record.message for record in caplog.records]
        assert said[-1].startswith(
            "PrecisionFallback: fell back from 16-mixed to 32-true at epoch 0, batch 5, global step 5 (the loss was"
            " nan; the input of `net.encoder.0` ranges from"
        )

    def test_nothing_else_is_called_the_cause(self, one: Any) -> None:
        """Masks are made of -inf, which fp16 holds."""

        class Masked(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.mask, self.first, self.last = nn.Identity(), nn.Linear(6, 8), nn.Linear(8, 1)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                mask = self.mask(torch.full((1, 8), -torch.inf).triu(1))
                return self.last(torch.softmax(self.first(x) + mask[:, :1], -1))

        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0] * (1e6 if batch_idx == 2 else 1.0)).float().pow(2).mean()

        module = runs.make_module(one, Masked(), training_step=training_step)
        trainer = runs.trainer(one, callbacks=[PrecisionFallback()], plugins=runs.fp16(one))
        with pytest.warns(UserWarning, match="input of `net.first` ranges from"):
            trainer.fit(module, runs.data())

    def test_the_layer_and_the_range_that_fp16_cannot_hold(self, one: Any, tmp_path: Path) -> None:
        logger = one.loggers.CSVLogger(tmp_path)
        module = poison.make_module(one, {2: "large_input"}, OPTIMIZERS["foreach"], by_hand=False)
        with pytest.warns(
            UserWarning, match=r"the input of `net\.encoder\.0` ranges from -.*e\+06 to .*e\+06, and fp16"
        ):
            poison.fit(one, module, [PrecisionFallback()], plugins=runs.fp16(one), logger=logger)
        [event] = [e for e in runs.incidents(logger.log_dir) if e["event"] == "precision_changed"]
        assert (event["precision_from"], event["precision_to"], event["step"]) == ("16-mixed", "32-true", 2)
        logger.save()
        assert "precision_bits" in (Path(logger.log_dir) / "metrics.csv").read_text()


class TestRefusals:
    def test_another_target(self) -> None:
        with pytest.raises(MisconfigurationException, match="expected"):
            PrecisionFallback("64-true")  # type: ignore[arg-type]

    def test_a_plugin_of_ones_own(self, one: Any) -> None:
        class Own(one.plugins.precision.MixedPrecision):
            pass

        trainer = runs.trainer(one, callbacks=[PrecisionFallback()], plugins=[Own("16-mixed", "cpu")])
        with pytest.raises(MisconfigurationException, match="does not know how to leave Own"):
            trainer.fit(poison.make_module(one, {}, OPTIMIZERS["foreach"], by_hand=False), poison.data())


def test_copies_and_pickles(one: Any) -> None:
    callback = PrecisionFallback("bf16-mixed")
    assert pickle.loads(pickle.dumps(callback)).to == copy.deepcopy(callback).to == "bf16-mixed"
