"""NaNEarlyStop: when it stops, what it leaves behind, what it says."""

import copy
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_stability import FractionalCheckpoint, GradNormMonitor, NaNEarlyStop, NonFiniteError
from lightning_stability._compat import MisconfigurationException
from tests import runs
from tests.recovery import poison


def adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-2)


class Run:
    """One fit, with what it said."""

    def __init__(
        self,
        pl: Any,
        kinds: dict[int, str],
        stop: NaNEarlyStop | None = None,
        callbacks: Any = (),
        validate: bool = False,
        optimizer: Any = adamw,
        **options: Any,
    ) -> None:
        self.stop = stop or NaNEarlyStop(patience=0)
        self.module = poison.make_module(pl, kinds, optimizer, by_hand=False)
        self.trainer = runs.trainer(pl, **{"max_epochs": 2, "callbacks": [self.stop, *callbacks], **options})
        loaders = [poison.data(), poison.data()] if validate else [poison.data()]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.trainer.fit(self.module, *loaders)
        self.warned = [str(w.message) for w in caught if "NaNEarlyStop" in str(w.message)]
        self.said = [text for text in self.warned if "an update was skipped" not in text]


class TestWhenItStops:
    @pytest.mark.parametrize("patience", [0, 1, 2])
    def test_after_patience_bad_updates_in_a_row_the_next_one_stops(self, pl: Any, patience: int) -> None:
        run = Run(pl, dict.fromkeys([1, 2], "nan_input"), NaNEarlyStop(patience))
        assert run.trainer.global_step == {0: 2, 1: 3, 2: 12}[patience]
        assert bool(run.said) == (patience < 2)

    def test_a_good_update_resets_the_count(self, one: Any) -> None:
        run = Run(one, dict.fromkeys([1, 3, 5, 7], "nan_gradient"), NaNEarlyStop(1))
        assert run.trainer.global_step == 12
        assert not run.said

    @pytest.mark.parametrize("options", [{"min_steps": 10}, {"min_epochs": 2}])
    def test_it_overrides_a_least_number_of_steps_or_epochs(self, pl: Any, options: dict[str, int]) -> None:
        run = Run(pl, {2: "nan_input"}, validate=True, num_sanity_val_steps=0, **options)
        assert run.trainer.global_step == 3
        assert not run.module.validations

    def test_the_weights_are_those_before_the_bad_step(self, one: Any) -> None:
        stopped = Run(one, {4: "nan_input"})
        shorter = Run(one, {}, max_steps=4)
        assert poison.differences(stopped.module.net.state_dict(), shorter.module.net.state_dict()) == []

    def test_a_bad_step_at_an_epochs_end_runs_no_end_of_epoch(self, one: Any) -> None:
        run = Run(one, {5: "nan_input"}, validate=True, num_sanity_val_steps=0)
        assert run.trainer.global_step == 6
        assert not run.module.epoch_metrics
        assert not run.module.validations

    def test_monitored_metric(self, pl: Any, tmp_path: Path) -> None:
        checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss", filename="{val_loss:.2f}", save_top_k=2)
        module_kinds: dict[int, str] = {}
        stop = NaNEarlyStop(patience=0, monitor="val_loss")

        class Spoil(pl.Callback):
            def on_validation_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
                if trainer.current_epoch == 1:
                    module.log("val_loss", math.nan)

        module = poison.make_module(pl, module_kinds, adamw, by_hand=False)
        module.validation_step = lambda batch, batch_idx: module.log("val_loss", _value(module))
        trainer = runs.trainer(pl, max_epochs=4, callbacks=[checkpoint, stop], enable_checkpointing=True)
        with pytest.warns(UserWarning, match="the metric `val_loss` was nan"):
            trainer.fit(module, poison.data(), poison.data())
        assert trainer.current_epoch == 1
        assert trainer.global_step == 12
        assert [path.name for path in tmp_path.iterdir()] == ["val_loss=1.00.ckpt"]


def _value(module: Any) -> float:
    return math.nan if module.trainer.current_epoch == 1 else 1.0


class TestAStopNeverMakesItWorse:
    def test_a_validation_that_would_raise_does_not_run(self, one: Any) -> None:
        from sklearn.metrics import roc_auc_score

        def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
            out = self.net(batch[0])
            roc_auc_score((batch[0][:, 0] > 0).int().numpy(), out.detach().numpy())

        class Poisoned(one.Callback):
            """What the guard prevents, so that the validation would indeed raise."""

            def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
                if trainer.global_step == 3:
                    module.net.head.weight.data.fill_(torch.nan)

        options = {"val_check_interval": 3, "num_sanity_val_steps": 0}
        module = poison.make_module(one, {2: "nan_input"}, adamw, by_hand=False)
        type(module).validation_step = validation_step
        with pytest.raises(ValueError, match="NaN"):
            runs.trainer(one, callbacks=[Poisoned()], **options).fit(module, poison.data(), poison.data())
        module = poison.make_module(one, {2: "nan_input"}, adamw, by_hand=False)
        type(module).validation_step = validation_step
        trainer = runs.trainer(one, callbacks=[NaNEarlyStop(patience=0)], **options)
        with pytest.warns(UserWarning, match="NaNEarlyStop ended the run"):
            trainer.fit(module, poison.data(), poison.data())
        assert trainer.state.finished

    def test_callbacks_and_schedules_that_want_a_metric_do_not_fail(self, pl: Any) -> None:
        def configure_optimizers(self: Any) -> Any:
            optimizer = adamw(self.parameters())
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}

        module = poison.make_module(pl, {2: "nan_input"}, adamw, by_hand=False)
        type(module).configure_optimizers = configure_optimizers
        early = pl.callbacks.EarlyStopping("val_loss")
        trainer = runs.trainer(pl, callbacks=[early, NaNEarlyStop(patience=0)], num_sanity_val_steps=0)
        with pytest.warns(UserWarning, match="NaNEarlyStop ended the run"):
            trainer.fit(module, poison.data(), poison.data())
        assert trainer.state.finished
        assert trainer.global_step == 3

    def test_the_checkpoints_are_those_from_before(self, pl: Any, tmp_path: Path) -> None:
        saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True, save_top_k=-1)
        run = Run(pl, {5: "nan_input"}, callbacks=[saver], enable_checkpointing=True)
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt", "last.ckpt", "nan_early_stop.ckpt"]
        for path in tmp_path.iterdir():
            checkpoint = torch.load(path, weights_only=False)
            assert not poison.nonfinite(checkpoint["state_dict"])
        last = torch.load(tmp_path / "last.ckpt", weights_only=False)
        assert last["global_step"] == 4
        assert f"last good checkpoint: {tmp_path / 'nan_early_stop.ckpt'}" in run.said[0]
        kept = torch.load(tmp_path / "nan_early_stop.ckpt", weights_only=False)
        assert poison.differences(kept["state_dict"], dict(run.module.state_dict())) == []

    def test_nothing_is_kept_when_no_update_was_ever_good(self, one: Any, tmp_path: Path) -> None:
        saver = one.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
        run = Run(one, {0: "nan_loss"}, callbacks=[saver], enable_checkpointing=True)
        assert list(tmp_path.iterdir()) == []
        assert "no update was ever applied" in run.said[0]

    def test_nothing_is_kept_twice(self, one: Any, tmp_path: Path) -> None:
        saver = one.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=2)
        run = Run(one, {4: "nan_input"}, callbacks=[saver], enable_checkpointing=True)
        assert [path.name for path in tmp_path.iterdir()] == ["epoch=0-step=4.ckpt"]
        assert "epoch=0-step=4.ckpt" in run.said[0]

    def test_checkpoint_callbacks_are_as_before_afterwards(self, one: Any, tmp_path: Path) -> None:
        saver = one.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1)
        Run(one, {1: "nan_input"}, callbacks=[saver], enable_checkpointing=True)
        assert not [name for name in vars(saver) if name.startswith("on_")]

    def test_the_run_resumes_from_what_was_kept(self, pl: Any, tmp_path: Path) -> None:
        def saver() -> Any:
            return pl.callbacks.ModelCheckpoint(tmp_path)

        stopped = Run(pl, {3: "nan_input"}, callbacks=[saver()], enable_checkpointing=True)
        module = poison.make_module(pl, {}, adamw, by_hand=False)
        again = NaNEarlyStop(patience=0)
        trainer = runs.trainer(pl, max_epochs=2, callbacks=[again, saver()], enable_checkpointing=True)
        trainer.fit(module, poison.data(), ckpt_path=tmp_path / "nan_early_stop.ckpt", weights_only=False)
        assert stopped.trainer.global_step == 4
        assert trainer.global_step == 12
        assert again.state_dict()["updates"] == 11
        assert again.state_dict()["skipped_bad"] == 1

    @pytest.mark.parametrize("bad", [4, 5, 6])
    def test_a_stop_at_an_epochs_border_loses_no_epoch(self, one: Any, tmp_path: Path, bad: int) -> None:
        def saver() -> Any:
            return one.callbacks.ModelCheckpoint(tmp_path)

        Run(one, {bad: "nan_input"}, callbacks=[saver()], enable_checkpointing=True)
        module = poison.make_module(one, {}, adamw, by_hand=False)
        trainer = runs.trainer(
            one, max_epochs=2, callbacks=[NaNEarlyStop(patience=0), saver()], enable_checkpointing=True
        )
        kept = tmp_path / "nan_early_stop.ckpt"
        newest = kept if kept.exists() else next(tmp_path.glob("epoch=0*"))
        trainer.fit(module, poison.data(), ckpt_path=newest, weights_only=False)
        assert (trainer.global_step, trainer.current_epoch) == (12, 2)

    def test_it_says_so_however_warnings_are_set(self, one: Any) -> None:
        for setting in ("ignore", "error", "default", "default"):
            module = poison.make_module(one, {2: "nan_input"}, adamw, by_hand=False)
            said: list[str] = []
            with warnings.catch_warnings():
                warnings.simplefilter(setting)
                warnings.filterwarnings("ignore", message="(?!NaNEarlyStop)")
                warnings.showwarning = lambda message, *args, said=said, **kwargs: said.append(str(message))
                runs.trainer(one, callbacks=[NaNEarlyStop(patience=0)]).fit(module, poison.data())
            assert any("NaNEarlyStop ended the run" in line for line in said), setting

    def test_a_logger_that_fails_does_not_hide_it(self, one: Any) -> None:
        class Broken(type(runs.memory_logger(one))):
            def save(self) -> None:
                if self.rows and "skipped_updates" in self.rows[-1][1]:
                    raise ConnectionError("the tracker is gone")

            def finalize(self, status: str) -> None:
                pass

        module = poison.make_module(one, {2: "nan_input"}, adamw, by_hand=False)
        with pytest.warns(UserWarning, match="NaNEarlyStop ended the run"):
            runs.trainer(one, callbacks=[NaNEarlyStop(patience=0)], logger=Broken()).fit(module, poison.data())

    def test_no_end_of_epoch_hook_runs_after_it(self, pl: Any) -> None:
        class Wants(pl.Callback):
            def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
                trainer.callback_metrics["val_loss"]

        module = poison.make_module(pl, {2: "nan_input"}, adamw, by_hand=False)
        trainer = runs.trainer(pl, callbacks=[Wants(), NaNEarlyStop(patience=0)], num_sanity_val_steps=0)
        trainer.fit(module, poison.data(), poison.data())
        assert trainer.state.finished
        assert "on_advance_end" not in vars(trainer.fit_loop)

    def test_good_weights_are_kept_when_another_callbacks_save_finds_out(self, one: Any, tmp_path: Path) -> None:
        class Saves(one.Callback):
            """A save of the user's own, between the bad step and the guard's hook."""

            def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
                if trainer.global_step == 4:
                    trainer.save_checkpoint(tmp_path / "mine.ckpt")

        saver = one.callbacks.ModelCheckpoint(tmp_path)
        stop = NaNEarlyStop(patience=0)
        module = poison.make_module(one, {3: "nan_input"}, adamw, by_hand=False)
        trainer = runs.trainer(one, callbacks=[Saves(), stop, saver], enable_checkpointing=True)
        trainer.fit(module, poison.data())
        assert (tmp_path / "nan_early_stop.ckpt").exists()
        assert not (tmp_path / "mine.ckpt").exists()

    def test_checkpoints_on_another_file_system(self, one: Any) -> None:
        import fsspec

        saver = one.callbacks.ModelCheckpoint("memory://runs/one")
        run = Run(one, {3: "nan_input"}, callbacks=[saver], enable_checkpointing=True)
        assert "last good checkpoint: memory://runs/one/nan_early_stop.ckpt" in run.said[0]
        assert fsspec.filesystem("memory").exists("/runs/one/nan_early_stop.ckpt")

    def test_with_fractional_checkpoint(self, pl: Any, tmp_path: Path) -> None:
        saver = FractionalCheckpoint(0.5, dirpath=tmp_path, save_top_k=-1)
        run = Run(pl, {8: "nan_input"}, callbacks=[saver], enable_checkpointing=True)
        names = sorted(path.name for path in tmp_path.iterdir())
        steps = ["epoch=000.50-step=000003.ckpt", "epoch=001.00-step=000006.ckpt"]
        assert names == [*steps, "last.ckpt", "nan_early_stop.ckpt", "steps.jsonl"]
        assert not {"on_advance_start", "on_advance_end"} & vars(run.trainer.fit_loop).keys()
        assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 6
        module = poison.make_module(pl, {}, adamw, by_hand=False)
        again = FractionalCheckpoint(0.5, dirpath=tmp_path)
        trainer = runs.trainer(pl, max_epochs=2, callbacks=[NaNEarlyStop(patience=0), again], enable_checkpointing=True)
        trainer.fit(module, poison.data(), ckpt_path=tmp_path / "last.ckpt")
        assert trainer.global_step == 12

    def test_loggers_are_told_and_saved(self, one: Any, tmp_path: Path) -> None:
        logger = one.loggers.CSVLogger(tmp_path, flush_logs_every_n_steps=10**6)
        run = Run(one, {3: "nan_input"}, callbacks=[GradNormMonitor()], logger=logger)
        assert run.said
        assert "skipped_updates" in (Path(logger.log_dir) / "metrics.csv").read_text()


class TestWhatItSays:
    @pytest.mark.parametrize(
        ("kind", "sentence"),
        [
            ("nan_loss", "the loss was nan"),
            ("inf_loss", "the loss was inf"),
            ("nan_gradient", "the gradient of `net.head.weight` was nan while the loss was finite"),
            ("overflow", "their squares overflow fp32; the largest is the gradient of `net.head.bias`"),
        ],
    )
    def test_what_became_non_finite_and_where(self, one: Any, kind: str, sentence: str) -> None:
        run = Run(one, {8: kind})
        assert len(run.said) == 1
        assert sentence in run.said[0]
        assert "epoch 1, batch 2, global step 8" in run.said[0]
        assert "8 applied, 1 skipped" in run.said[0]

    def test_the_batch_within_its_window(self, one: Any) -> None:
        run = Run(one, {1: "nan_loss"}, accumulate_grad_batches=3)
        assert "epoch 0, batch 1, global step 0" in run.said[0]

    def test_an_input_that_was_not_finite(self, one: Any) -> None:
        module = poison.make_module(one, {}, adamw, by_hand=False)
        x = poison.data().dataset.tensors[0].clone()
        x[9, 3] = torch.inf
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)
        with pytest.warns(UserWarning, match=r"the input held non-finite values: `batch\[0\]`"):
            runs.trainer(one, callbacks=[NaNEarlyStop(patience=0)]).fit(module, loader)

    def test_a_buffer_that_the_loss_does_not_show(self, one: Any) -> None:
        def training_step(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 2:
                self.net.running_max.fill_(torch.inf)
            return self.net.head(batch[0] @ torch.ones(6, 8)).pow(2).mean()

        module = poison.make_module(one, {}, adamw, by_hand=False)
        type(module).training_step = training_step
        with pytest.warns(UserWarning, match=r"made the buffer `net\.running_max` non-finite"):
            runs.trainer(one, callbacks=[NaNEarlyStop(patience=0)]).fit(module, poison.data())
        assert math.isfinite(module.net.running_max)

    def test_a_weight_that_something_else_wrote(self, one: Any) -> None:
        class Spoil(one.Callback):
            def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
                if batch_idx == 2:
                    module.net.head.bias.data.fill_(torch.nan)

        run = Run(one, {}, callbacks=[Spoil()])
        assert "`net.head.bias` is not finite: an update before this step" in run.said[0]

    def test_the_culprit_is_the_last_in_forward_order_not_in_the_order_of_definition(self, one: Any) -> None:
        class Backwards(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.last = nn.Linear(6, 1)
                self.middle = nn.Linear(6, 6)
                self.first = nn.Linear(6, 6)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = self.middle(self.first(x))
                return self.last(x + (x * 0.0).square().sum(1, keepdim=True).sqrt())  # nan comes to be here

        module = runs.make_module(one, Backwards(), on_before_optimizer_step=lambda self, optimizer: None)
        with pytest.warns(UserWarning, match=r"the gradient of `net\.middle\.(weight|bias)` was nan"):
            runs.trainer(one, callbacks=[NaNEarlyStop(patience=0)]).fit(module, runs.data())

    def test_every_fit_ends_with_one_line(self, pl: Any, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level("INFO"):
            Run(pl, dict.fromkeys([1, 7], "nan_gradient"), NaNEarlyStop(1))
        [line] = [record.getMessage() for record in caplog.records if "NaNEarlyStop:" in record.getMessage()]
        assert "10 updates, 2 skipped" in line
        assert "first incident at epoch 0, batch 1" in line
        assert "last at epoch 1, batch 1" in line

    def test_what_the_optimizer_costs_is_said_once_at_the_start(
        self, one: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        lines = {}
        for name, optimizer in {
            "foreach": lambda p: torch.optim.AdamW(p, foreach=True),
            "fused": lambda p: torch.optim.AdamW(p, fused=True),
            "rprop": lambda p: torch.optim.Rprop(p, foreach=False),
        }.items():
            caplog.clear()
            with caplog.at_level("INFO"):
                Run(one, {}, optimizer=optimizer)
            lines[name] = [
                r.getMessage() for r in caplog.records if "one read of the device per step" in r.getMessage()
            ]
        assert lines == {
            "foreach": ["Guarding AdamW(foreach) takes one read of the device per step; fused=True removes it."],
            "fused": [],
            "rprop": ["Guarding Rprop(for-loop) takes one read of the device per step."],
        }

    def test_skips_and_the_stop_are_events(self, pl: Any, tmp_path: Path) -> None:
        logger = pl.loggers.CSVLogger(tmp_path)
        Run(pl, dict.fromkeys([1, 2], "nan_input"), NaNEarlyStop(1), logger=logger)
        events = runs.incidents(logger.log_dir)
        assert [event["event"] for event in events] == ["update_skipped", "update_skipped", "training_stopped"]
        assert [event["batch_idx"] for event in events] == [1, 2, 2]
        assert events[0]["by"] == "guard"
        assert not events[0]["ordinary"]
        assert events[-1]["skipped"] == 2


class TestActionRaise:
    def test_the_error_says_where(self, pl: Any) -> None:
        stop = NaNEarlyStop(patience=0, action="raise")
        with pytest.raises(NonFiniteError, match="the loss was nan") as caught:
            Run(pl, {8: "nan_loss"}, stop)
        error = pickle.loads(pickle.dumps(caught.value))
        assert (error.what, error.step, error.epoch, error.batch_idx) == ("loss", 8, 1, 2)
        assert str(error) == str(caught.value)

    def test_a_checkpoint_on_exception_is_finite(self, one: Any, tmp_path: Path) -> None:
        saver = one.callbacks.ModelCheckpoint(tmp_path, save_on_exception=True)
        with pytest.raises(NonFiniteError):
            Run(
                one,
                {8: "nan_input"},
                NaNEarlyStop(patience=0, action="raise"),
                callbacks=[saver],
                enable_checkpointing=True,
            )
        for path in tmp_path.iterdir():
            assert not poison.nonfinite(torch.load(path, weights_only=False)["state_dict"])


class TestRefusals:
    def test_weights_that_are_not_finite_before_the_first_step(self, pl: Any) -> None:
        module = poison.make_module(pl, {}, adamw, by_hand=False)
        module.net.head.bias.data.fill_(torch.inf)
        with pytest.raises(MisconfigurationException, match=r"not finite before the first step: `net\.head\.bias`"):
            runs.trainer(pl, callbacks=[NaNEarlyStop(patience=0)]).fit(module, poison.data())

    def test_lbfgs(self, one: Any) -> None:
        with pytest.raises(MisconfigurationException, match="LBFGS cannot be guarded"):
            Run(one, {}, optimizer=lambda p: torch.optim.LBFGS(p))

    def test_an_eps_that_is_0_in_fp16(self, one: Any) -> None:
        with pytest.raises(MisconfigurationException, match=r"AdamW\(eps=1e-08\) with fp16 weights.*eps=1e-4"):
            Run(one, {}, precision="16-true")

    @pytest.mark.parametrize("options", [{"patience": -1}, {"patience": 1.5}, {"patience": True}, {"action": "halt"}])
    def test_options_out_of_range(self, options: dict[str, Any]) -> None:
        with pytest.raises(MisconfigurationException, match="expected"):
            NaNEarlyStop(**options)


class TestLifeInATrainer:
    def test_copies_and_pickles_in_the_middle_of_a_fit(self, pl: Any) -> None:
        copies = []

        class Copy(pl.Callback):
            def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
                copies.append((copy.deepcopy(stop), pickle.loads(pickle.dumps(stop))))

        stop = NaNEarlyStop(1)
        Run(pl, {1: "nan_input"}, stop, callbacks=[Copy()])
        assert all(isinstance(c, NaNEarlyStop) and c.patience == 1 for pair in copies for c in pair)

    def test_a_second_fit_and_a_second_trainer(self, one: Any) -> None:
        stop = NaNEarlyStop(patience=0)
        first = Run(one, {2: "nan_input"}, stop)
        second = Run(one, {2: "nan_input"}, stop)
        assert len(first.said) == len(second.said) == 1
        second.trainer.fit_loop.max_epochs = 4
        second.trainer.fit(second.module, poison.data())
        assert second.trainer.global_step > 3

    def test_in_every_precision(self, one: Any) -> None:
        for precision in ("bf16-mixed", "bf16-true", "64-true"):
            run = Run(one, {3: "nan_input"}, NaNEarlyStop(1), precision=precision)
            assert not poison.nonfinite(run.module.state_dict())
            assert run.trainer.global_step == 12

    def test_float64_has_room_for_what_overflows_fp32(self, one: Any) -> None:
        def large(optimizer: Any) -> Any:
            return torch.optim.SGD(optimizer, lr=1e-30)

        assert not Run(one, {2: "overflow"}, precision="64-true", optimizer=large).said
        assert Run(one, {2: "nan_gradient"}, precision="64-true", optimizer=large).said

    def test_fast_dev_run(self, one: Any) -> None:
        assert Run(one, {0: "nan_loss"}, fast_dev_run=3, max_epochs=None).said

    @pytest.mark.parametrize("finder", ["LearningRateFinder", "BatchSizeFinder"])
    def test_the_finders_steps_are_not_the_runs(self, pl: Any, finder: str, tmp_path: Path) -> None:
        def optimizer(module: Any) -> Any:
            return torch.optim.AdamW(module.parameters(), lr=module.lr)

        module = runs.make_module(pl, optimizer=optimizer, on_before_optimizer_step=lambda self, optimizer: None)
        module.lr, module.batch_size = 1e-3, 2
        module.train_dataloader = lambda: runs.data(32, module.batch_size)
        options = {
            "LearningRateFinder": {"num_training_steps": 10, "max_lr": 1e6},
            "BatchSizeFinder": {"max_trials": 1},
        }
        search = getattr(pl.callbacks, finder)(**options[finder])
        stop = NaNEarlyStop(patience=0)
        runs.trainer(pl, callbacks=[search, stop], default_root_dir=tmp_path).fit(module)
        assert stop.state_dict()["updates"] == math.ceil(32 / module.batch_size)

    def test_with_a_scheduler_that_is_made_later(self, one: Any) -> None:
        average = one.callbacks.StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)
        plain = runs.make_module(one, on_before_optimizer_step=lambda self, optimizer: None)
        trainer = runs.trainer(one, max_epochs=3, callbacks=[average, NaNEarlyStop(patience=0)])
        trainer.fit(plain, runs.data())
        assert trainer.state.finished
        assert not poison.nonfinite(plain.state_dict())

    def test_a_loss_that_the_module_itself_leaves_out(self, one: Any) -> None:
        def without_nan(self: Any, batch: Any, batch_idx: int) -> Any:
            loss = self.net(batch[0] * (torch.nan if batch_idx == 2 else 1.0)).pow(2).mean()
            return loss if torch.isfinite(loss) else None

        module = poison.make_module(one, {}, adamw, by_hand=False)
        type(module).training_step = without_nan
        runs.trainer(one, callbacks=[NaNEarlyStop(patience=0)]).fit(module, poison.data())
        assert not poison.nonfinite(module.state_dict())

    @pytest.mark.parametrize("bad", [True, False])
    def test_two_forward_passes_before_two_backward_passes(self, one: Any, bad: bool) -> None:
        def training_step(self: Any, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            first = self.net(batch[0] * (torch.nan if bad and batch_idx == 2 else 1.0)).pow(2).mean()
            second = self.net(batch[0] + 1.0).pow(2).mean()
            self.manual_backward(first)
            self.manual_backward(second)
            optimizer.step()

        module = poison.make_module(one, {}, adamw, by_hand=False)
        type(module).training_step = training_step
        module.automatic_optimization = False
        stop = NaNEarlyStop(1)
        runs.trainer(one, callbacks=[stop]).fit(module, poison.data())
        assert stop.state_dict()["skipped_bad"] == int(bad)
        assert not poison.nonfinite(module.state_dict())

    def test_with_torch_compile(self, one: Any) -> None:
        net = torch.compile(runs.Net(), backend="aot_eager")
        module = runs.make_module(one, net, on_before_optimizer_step=lambda self, optimizer: None)
        type(module).training_step = lambda self, batch, batch_idx: (
            self.net(batch[0]).pow(2).mean() * (torch.nan if batch_idx == 1 else 1.0)
        )
        stop = NaNEarlyStop(1)
        runs.trainer(one, callbacks=[stop]).fit(module, runs.data())
        assert (stop.state_dict()["updates"], stop.state_dict()["skipped_bad"]) == (3, 1)
        assert not poison.nonfinite(module.state_dict())

    def test_with_data_of_unknown_length(self, one: Any) -> None:
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self) -> Any:
                return iter(torch.randn(6, 6))

        module = poison.make_module(one, {}, adamw, by_hand=False)
        type(module).training_step = lambda self, batch, batch_idx: (
            self.net.head(batch @ torch.ones(6, 8)).mean() * (torch.inf if batch_idx == 2 else 1.0)
        )
        trainer = runs.trainer(one, callbacks=[NaNEarlyStop(patience=0)], val_check_interval=2)
        with pytest.warns(UserWarning, match="epoch 0, batch 2"):
            trainer.fit(module, torch.utils.data.DataLoader(Stream(), batch_size=1))
