"""PrecisionFallback: from the retried batch on, the run is the one whose precision was changed by hand before it."""

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_stability import GradNormMonitor, NaNEarlyStop, PrecisionFallback
from lightning_stability._compat import MisconfigurationException
from tests import runs
from tests.recovery import poison


@pytest.fixture(params=runs.NAMESPACES)
def pl(request: pytest.FixtureRequest) -> Any:
    return runs.load_namespace(request.param)


@pytest.fixture
def one() -> Any:
    return runs.load_namespace("pytorch_lightning")


OPTIMIZERS = {
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "eps for fp16": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-3),
}


def change_by_hand(pl: Any, batch: int, to: str = "32-true") -> Any:
    """Changes the precision before the given batch of the run."""

    class Change(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            if module.batch + 1 == batch:
                trainer.strategy.precision_plugin = (
                    pl.plugins.precision.Precision()
                    if to == "32-true"
                    else pl.plugins.precision.MixedPrecision("bf16-mixed", "cpu")
                )

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
        with pytest.warns(UserWarning, match="16-true cannot go on at epoch 0, batch 2"):
            trainer.fit(module, loader)
        assert {t.dtype for t in module.state_dict().values()} == {torch.float32}
        states = trainer.optimizers[0].state.values()
        assert {state["exp_avg"].dtype for state in states} == {torch.float32}
        assert [dtype for dtype, _ in module.net.seen] == [torch.float16] * 3 + [torch.float32] * 2
        assert module.net.seen[3][1] == pytest.approx(float(x[4].abs().max()))
        assert trainer.global_step == 4

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

    def test_it_says_so(self, one: Any, tmp_path: Path) -> None:
        logger = one.loggers.CSVLogger(tmp_path)
        module = poison.make_module(one, {2: "nan_input"}, OPTIMIZERS["foreach"], by_hand=False)
        callbacks = [PrecisionFallback(), NaNEarlyStop()]
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

    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
    def test_in_any_order(self, one: Any, order: tuple[int, ...]) -> None:
        results = []
        for places in ((0, 1, 2), order):
            callbacks = [PrecisionFallback(), NaNEarlyStop(1), GradNormMonitor()]
            module = poison.make_module(one, {2: "large_input", 4: "nan_input"}, OPTIMIZERS["fused"], by_hand=False)
            logger = runs.memory_logger(one)
            listed = [callbacks[place] for place in places]
            result = poison.fit(one, module, listed, plugins=runs.fp16(one, init_scale=256.0), logger=logger)
            rows = sorted(str(sorted(row.items())) + str(step) for step, row in logger.rows)
            results.append({**result, "rows": rows, "states": [callback.state_dict() for callback in callbacks]})
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


class TestCheckpoints:
    def test_a_resumed_run_goes_on_in_the_precision_it_had_fallen_back_to(self, pl: Any, tmp_path: Path) -> None:
        def fit(kinds: dict[int, str], **options: Any) -> Any:
            module = poison.make_module(pl, kinds, OPTIMIZERS["foreach"], by_hand=False)
            saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
            trainer = runs.trainer(
                pl,
                callbacks=[PrecisionFallback(), saver],
                plugins=runs.fp16(pl),
                enable_checkpointing=True,
                max_epochs=2,
            )
            torch.manual_seed(2)
            trainer.fit(module, poison.data(), **options)
            return trainer, module

        whole, trained = fit({2: "large_input"})
        state = torch.get_rng_state()
        del state
        resumed, _ = fit({}, ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=False)
        assert whole.precision == resumed.precision == "32-true"
        assert resumed.global_step == 12
        assert not poison.nonfinite(trained.state_dict())


class TestWhatItSays:
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
