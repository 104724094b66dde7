"""The record of each step, and what the runtime touches in Lightning and torch."""

import contextlib
import inspect
import itertools
from typing import Any

import pytest
import torch

from lightning_stability import GradNormMonitor
from lightning_stability._compat import MisconfigurationException, is_overridden
from lightning_stability.health.loss_scale import scale_tensor, unscales_itself
from lightning_stability.runtime import log_folder, session_of
from tests import runs


def fit(pl: Any, module: Any, loader: Any = None, **options: Any) -> list[Any]:
    recorder = runs.RecordCallback()
    runs.trainer(pl, callbacks=[recorder], **options).fit(module, loader or runs.data())
    return recorder.records


class TestRecord:
    def test_says_what_went_into_the_step(self, pl: Any) -> None:
        losses = []

        def training_step(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.net(batch[0]).pow(2).mean()
            losses.append(loss.item())
            return loss

        def optimizer(module: Any) -> Any:
            groups = [
                {"params": module.net.head.parameters(), "lr": 0.1},
                {"params": module.net.encoder.parameters()},
            ]
            return torch.optim.SGD(groups, lr=torch.tensor(0.01))

        module = runs.make_module(pl, optimizer=optimizer, training_step=training_step)
        records = fit(pl, module, runs.data(14), accumulate_grad_batches=3, max_epochs=2)
        assert [r.batches for r in records] == [3, 3, 1] * 2
        assert [r.step for r in records] == list(range(6))
        assert [r.logger_step for r in records] == list(range(6))
        assert [r.epoch for r in records] == [0, 0, 0, 1, 1, 1]
        assert records[0].loss == pytest.approx(sum(losses[:3]) / 3)
        assert records[2].loss == pytest.approx(losses[6] / 3), "Lightning divides a short window by 3 as well"
        assert all(r.learning_rates == pytest.approx((0.1, 0.01)) for r in records)
        assert all(r.loss_finite and r.gradients_finite and r.skipped_by is None for r in records)
        assert all(r.loss_scale is None and r.clip_coefficient is None for r in records)

    def test_tells_nan_inf_and_overflow_apart(self, pl: Any) -> None:
        factors = [1.0, float("nan"), float("inf"), 1e25]

        def heal(self: Any, batch: Any, batch_idx: int) -> None:
            torch.nn.init.ones_(self.net.weight)

        module = runs.make_module(
            pl,
            torch.nn.Linear(6, 1),
            optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.0),
            training_step=lambda self, batch, batch_idx: self.net.weight.sum() * factors[batch_idx],
            on_train_batch_start=heal,
        )
        records = fit(pl, module)
        assert [r.gradients for r in records] == ["finite", "nan", "inf", "overflow"]
        assert [r.loss_finite for r in records] == [True, False, False, True]

    def test_many_gradients_whose_sum_alone_overflows(self, pl: Any) -> None:
        class Two(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))

        module = runs.make_module(
            pl, Two(), training_step=lambda self, batch, batch_idx: (self.net.a + self.net.b).sum() * 1.4e19
        )
        assert fit(pl, module, max_steps=1)[0].gradients == "overflow"

    def test_a_loss_that_is_finite_with_gradients_that_are_not(self, pl: Any) -> None:
        module = runs.make_module(pl, training_step=lambda self, b, i: (self.net.head.weight * 0).sum().sqrt())
        record = fit(pl, module, max_steps=1)[0]
        assert record.loss_finite
        assert record.gradients == "nan"

    @pytest.mark.parametrize("fused", [False, True])
    def test_says_that_grad_scaler_skipped(self, pl: Any, fused: bool) -> None:
        weights = []

        def on_train_batch_end(self: Any, *args: Any) -> None:
            weights.append(torch.nn.utils.parameters_to_vector(self.parameters()).detach().clone())

        module = runs.make_module(
            pl,
            optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, fused=fused),
            on_train_start=on_train_batch_end,
            on_train_batch_end=on_train_batch_end,
        )
        records = fit(pl, module, max_epochs=8, plugins=runs.fp16(pl, init_scale=2.0**40))
        stayed = [torch.equal(before, after) for before, after in itertools.pairwise(weights)]
        assert [r.skipped_by for r in records] == ["GradScaler" if same else None for same in stayed]
        assert stayed[0]
        assert not stayed[-1]

    @pytest.mark.parametrize("fp16", [False, True])
    def test_says_that_there_was_no_loss(self, pl: Any, fp16: bool) -> None:
        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else self.net(batch[0]).float().pow(2).mean()

        module = runs.make_module(pl, training_step=training_step)
        records = fit(pl, module, plugins=runs.fp16(pl) if fp16 else None)
        assert [r.batches for r in records] == [1, 0, 1, 1]
        assert records[1].loss is None
        if fp16:
            assert records[1].skipped_by == "no loss"

    def test_of_two_optimizers_on_one_backward_pass(self, pl: Any) -> None:
        def training_step(self: Any, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.net(batch[0]).pow(2).mean())
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def optimizers(module: Any) -> Any:
            parts = (module.net.encoder, module.net.head)
            return tuple(torch.optim.SGD(part.parameters(), lr=0.1) for part in parts)

        module = runs.make_module(pl, optimizer=optimizers, training_step=training_step)
        module.automatic_optimization = False
        records = fit(pl, module)
        assert [r.optimizer for r in records] == [0, 1] * 4
        assert [r.batches for r in records] == [1] * 8
        assert records[0].loss == records[1].loss

    def test_has_the_loss_of_the_backward_pass_whatever_the_module_does_to_it_afterwards(self, pl: Any) -> None:
        losses = []

        def training_step(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.net(batch[0]).pow(2).mean()
            if not self.automatic_optimization:
                self.manual_backward(loss)
            losses.append(loss.item())
            with torch.no_grad():
                loss.mul_(2.0 if not self.automatic_optimization else 1.0)
            if not self.automatic_optimization:
                self.optimizers().step()
                self.optimizers().zero_grad()
            return loss

        for automatic in (True, False):
            losses.clear()
            module = runs.make_module(pl, training_step=training_step)
            module.automatic_optimization = automatic
            assert [record.loss for record in fit(pl, module)] == losses

    def test_of_every_step_arrives_in_order_however_many_travel_together(self, pl: Any) -> None:
        recorders = []
        for every in (1, 3, 8, 100):
            recorder = runs.RecordCallback()
            recorder.read_every = every
            runs.trainer(pl, callbacks=[recorder], max_epochs=3).fit(runs.make_module(pl), runs.data(22))
            recorders.append(recorder)
        first, *others = ([(r.step, r.epoch, r.loss, r.grad_norms.tolist()) for r in x.records] for x in recorders)
        assert [step for step, *_ in first] == list(range(33))
        assert all(other == first for other in others)

    def test_is_read_before_the_epoch_ends(self, pl: Any) -> None:
        seen = []
        recorder = runs.RecordCallback()
        module = runs.make_module(pl, on_train_epoch_end=lambda self: seen.append(len(recorder.records)))
        runs.trainer(pl, callbacks=[recorder], max_epochs=2).fit(module, runs.data())
        assert seen == [4, 8]


class TestMeasuredOnce:
    def test_however_many_callbacks_ask_and_in_whatever_order(self, pl: Any) -> None:
        norms = 0

        class Count(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                nonlocal norms
                norms += func.overloadpacket is torch.ops.aten._foreach_norm
                return func(*args, **(kwargs or {}))

        first, second = runs.RecordCallback(), runs.RecordCallback()
        callbacks = [first, GradNormMonitor(), second]
        with Count():
            module = runs.make_module(pl)
            runs.trainer(pl, callbacks=callbacks, logger=runs.memory_logger(pl)).fit(module, runs.data())
        assert norms == 4
        assert [id(r) for r in first.records] == [id(r) for r in second.records]
        assert len({id(runtime) for c in (first, second) for runtime in c.seen_runtimes}) == 1

    def test_lists_are_made_once_and_remade_when_the_trained_parameters_change(
        self, pl: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = []
        original = torch.nn.Module.named_parameters
        monkeypatch.setattr(
            torch.nn.Module,
            "named_parameters",
            lambda self, *a, **k: (made.append(1), original(self, *a, **k))[1],
        )

        def training_step(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
            made.clear() if batch_idx == 1 else None
            if batch_idx == 3:
                counts.append(len(made))
                made.clear()
                self.extra = torch.nn.Parameter(torch.ones(6))
                self.trainer.optimizers[0].add_param_group({"params": [self.extra]})
            return self.net(batch[0] * getattr(self, "extra", 1.0)).pow(2).mean()

        counts: list[int] = []
        module = runs.make_module(pl, training_step=training_step, on_before_optimizer_step=lambda self, o: None)
        records = fit(pl, module)
        assert counts == [0]
        assert "extra" in records[3].parameter_names
        assert len(records[3].parameter_names) == len(records[2].parameter_names) + 1


class TestLifetime:
    def test_ends_with_the_last_callback_and_puts_everything_back(self, pl: Any) -> None:
        trainer = runs.trainer(pl, callbacks=[runs.RecordCallback(), runs.RecordCallback()])
        plugin = trainer.strategy.precision_plugin
        before = dict(vars(plugin))
        module = runs.make_module(pl)
        trainer.fit(module, runs.data())
        assert session_of(trainer) is None
        assert vars(plugin) == before
        assert not trainer.optimizers[0]._optimizer_step_pre_hooks

    def test_a_checkpoint_from_before_scaler_state_is_kept(self, pl: Any, tmp_path: Any) -> None:
        """The plugin keeps its class while tapped: a checkpoint's precision state is keyed by it."""
        keys = {}
        for name, callbacks in (("with", [runs.RecordCallback()]), ("without", [])):
            path = tmp_path / name
            save = lambda self, path=path: self.trainer.save_checkpoint(path)  # noqa: E731
            module = runs.make_module(pl, on_train_epoch_end=save)
            runs.trainer(pl, callbacks=callbacks, plugins=runs.fp16(pl, init_scale=64.0)).fit(module, runs.data())
            checkpoint = torch.load(path, weights_only=False)
            keys[name] = checkpoint["MixedPrecision"]["scale"]
        assert keys["with"] == keys["without"] == 64.0

    @pytest.mark.parametrize("strategy", ["DeepSpeedStrategy", "XLAStrategy"])
    def test_strategies_that_hide_gradients_are_refused_at_setup(self, pl: Any, strategy: str) -> None:
        # A CPU cannot run these strategies; a strategy is known by its class's name, in either namespace.
        refused = type(strategy, (pl.strategies.SingleDeviceStrategy,), {})
        trainer = runs.trainer(
            pl,
            strategy=refused(device=torch.device("cpu")),
            callbacks=[runs.RecordCallback()],
            devices="auto",
        )
        with pytest.raises(MisconfigurationException, match=rf"under {strategy}: .*(use|leave)") as raised:
            trainer.fit(runs.make_module(pl), runs.data())
        assert isinstance(raised.value, pl.utilities.exceptions.MisconfigurationException)

    def test_log_folder(self, pl: Any, tmp_path: Any) -> None:
        assert log_folder(runs.trainer(pl)) is None
        csv = runs.trainer(pl, logger=pl.loggers.CSVLogger(tmp_path))
        assert log_folder(csv) == csv.logger.log_dir
        assert log_folder(runs.trainer(pl, logger=runs.memory_logger(pl))) is None


class TestPrivateNames:
    """Each private name that we lean on; when one of these fails, Lightning or torch has changed under us."""

    def test_the_plugins_methods_and_their_order(self, pl: Any) -> None:
        plugin_class = pl.plugins.precision.Precision
        for name in ("pre_backward", "optimizer_step", "_clip_gradients", "clip_grad_by_norm", "main_params"):
            assert callable(getattr(plugin_class, name))
        order = []
        module = runs.make_module(
            pl,
            on_before_optimizer_step=lambda self, o: order.append("module"),
            configure_gradient_clipping=lambda self, o, **k: order.append("clip"),
        )

        class Hook(pl.Callback):
            def on_before_optimizer_step(self, *args: Any) -> None:
                order.append("callback")

        trainer = runs.trainer(pl, callbacks=[Hook()], max_steps=1)
        plugin = trainer.strategy.precision_plugin
        original = plugin._clip_gradients
        plugin._clip_gradients = lambda *a, **k: (order.append("_clip_gradients"), original(*a, **k))[1]
        trainer.fit(module, runs.data())
        assert order == ["callback", "module", "_clip_gradients", "clip"]

    def test_batches_that_stepped_is_the_loggers_step(self, pl: Any) -> None:
        module = runs.make_module(pl)
        module.training_step = lambda batch, batch_idx: module.log("own", 1.0) or module.net(batch[0]).mean()
        logger = runs.memory_logger(pl)
        recorder = runs.RecordCallback()
        trainer = runs.trainer(pl, logger=logger, callbacks=[recorder], accumulate_grad_batches=2)
        trainer.fit(module, runs.data())
        assert [step for step, _ in logger.rows] == [r.logger_step for r in recorder.records]

    def test_the_loss_in_automatic_optimization_is_lightnings_own(self, pl: Any) -> None:
        """A tensor made by Lightning, that no module writes again: it is read steps later."""
        returned, seen = [], []

        def training_step(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
            returned.append(self.net(batch[0]).pow(2).mean())
            return returned[-1]

        class Hook(pl.Callback):
            def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
                seen.append(loss.data_ptr())

        module = runs.make_module(pl, training_step=training_step)
        runs.trainer(pl, callbacks=[Hook()]).fit(module, runs.data())
        assert len(seen) == 4
        assert all(own != loss.data_ptr() for own, loss in zip(seen, returned, strict=True))

    def test_grad_scalers_scale(self) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        plugin = type("Plugin", (), {"scaler": scaler})()
        assert scale_tensor(plugin) is None
        scaler.scale(torch.ones(1))
        assert float(scale_tensor(plugin)) == scaler.get_scale() == 8.0
        plugin.scaler = torch.amp.GradScaler("cpu", enabled=False)
        assert scale_tensor(plugin) is None

    def test_optimizers_that_unscale_themselves(self) -> None:
        weights = [torch.nn.Parameter(torch.ones(1))]
        assert unscales_itself(torch.optim.AdamW(weights, fused=True))
        assert not unscales_itself(torch.optim.AdamW(weights))

    def test_grad_scaler_tells_a_fused_optimizer_before_its_step_hooks(self) -> None:
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.AdamW([weight], fused=True)
        seen = []
        optimizer.register_step_pre_hook(lambda o, a, k: seen.append(o.found_inf.item()))
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale((weight * float("inf")).sum()).backward()
        scaler.step(optimizer)
        assert seen == [1.0]

    def test_foreach_norm_takes_a_dtype(self) -> None:
        [norm] = torch._foreach_norm([torch.full((4,), 60000.0, dtype=torch.float16)], 2, torch.float32)
        assert norm.dtype == torch.float32
        assert norm == 120000.0

    @pytest.mark.parametrize("bad", [None, torch.ones(2).to_sparse()])
    def test_foreach_norm_refuses_what_it_cannot_take(self, bad: Any) -> None:
        with pytest.raises((TypeError, NotImplementedError)):
            torch._foreach_norm([torch.ones(2), bad], 2, None)

    def test_is_overridden(self, pl: Any) -> None:
        module = runs.make_module(pl)
        assert not is_overridden("configure_gradient_clipping", module)
        assert is_overridden("training_step", module)
        module.configure_gradient_clipping = lambda *args: None
        assert is_overridden("configure_gradient_clipping", module)
        signature = inspect.signature(pl.LightningModule.configure_gradient_clipping)
        assert list(signature.parameters)[1:] == ["optimizer", "gradient_clip_val", "gradient_clip_algorithm"]


class TestImport:
    def test_one_class_is_a_callback_of_both(self) -> None:
        for name in runs.NAMESPACES:
            pl = runs.load_namespace(name)
            assert isinstance(GradNormMonitor(), pl.Callback)
            with contextlib.suppress(pl.utilities.exceptions.MisconfigurationException):
                raise MisconfigurationException

    @pytest.mark.parametrize("namespace", runs.NAMESPACES)
    def test_short_name_on_the_command_line(self, namespace: str, tmp_path: Any) -> None:
        cli = pytest.importorskip(f"{namespace}.cli")
        pl = runs.load_namespace(namespace)
        made = cli.LightningCLI(
            type(runs.make_module(pl)),
            run=False,
            save_config_callback=None,
            args=[
                "--trainer.callbacks+=GradNormMonitor",
                "--trainer.callbacks.group_depth=3",
                "--trainer.logger=false",
            ],
        )
        [monitor] = [c for c in made.trainer.callbacks if isinstance(c, GradNormMonitor)]
        assert monitor.group_depth == 3
