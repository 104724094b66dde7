"""What GradNormMonitor logs when, what it warns about, and how it behaves in a Trainer's life."""

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_stability import GradNormMonitor
from lightning_stability.runtime import session_of
from tests import runs


def scripted(pl: Any, norms: list[float], **options: Any) -> Any:
    """A module with one weight whose gradient's norm at step i is `norms[i]`."""

    class Weight(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net.weight.sum() * norms[self.trainer.global_step]

    options.setdefault("optimizer", lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    return runs.make_module(pl, Weight(), training_step=training_step, **options)


def fit_scripted(
    pl: Any, norms: list[float], monitor: GradNormMonitor, **options: Any
) -> list[tuple[int, dict[str, float]]]:
    logger = options.pop("logger", None) or runs.memory_logger(pl)
    trainer = runs.trainer(pl, logger=logger, callbacks=[monitor], **{"max_steps": len(norms), **options})
    trainer.fit(scripted(pl, norms), runs.data(2 * len(norms)))
    return getattr(logger, "rows", [])


class TestWhatIsLogged:
    def test_every_n_steps_with_the_largest_in_between(self, pl: Any) -> None:
        rows = fit_scripted(pl, [1, 9, 2, 3, 5, 4, 7, 1], GradNormMonitor(every_n_steps=3))
        assert [step for step, _ in rows] == [2, 5]
        assert [row["grad_norm/total"] for _, row in rows] == [2, 4]
        assert [row["grad_norm/total_max"] for _, row in rows] == [9, 5]

    def test_by_default_as_often_as_the_trainer_logs(self, pl: Any) -> None:
        module = scripted(pl, [1.0] * 10)
        module.on_train_batch_end = lambda *args: module.log("own", 1.0)
        logger = runs.memory_logger(pl)
        trainer = runs.trainer(pl, logger=logger, callbacks=[GradNormMonitor()], log_every_n_steps=4)
        trainer.fit(module, runs.data(20))
        ours = [step for step, row in logger.rows if "grad_norm/total" in row]
        assert ours == [step for step, row in logger.rows if "own" in row] == [3, 7]

    def test_nonfinite_values_are_counted_and_never_averaged_in(self, pl: Any) -> None:
        nan, inf = float("nan"), float("inf")
        rows = fit_scripted(pl, [1, nan, 2, inf, nan, nan], GradNormMonitor(every_n_steps=2))
        assert [row["grad_norm/nonfinite_steps"] for _, row in rows] == [1, 2, 4]
        assert ["grad_norm/total" in row for _, row in rows] == [False, False, False]
        assert [row.get("grad_norm/total_max") for _, row in rows] == [1, 2, None]

    def test_a_gradient_whose_square_overflows_fp32_counts_as_nonfinite(self, pl: Any) -> None:
        rows = fit_scripted(pl, [1.0, 1e25, 1e18], GradNormMonitor(every_n_steps=1))
        assert [row["grad_norm/nonfinite_steps"] for _, row in rows] == [0, 1, 1]
        assert "grad_norm/total" not in rows[1][1]
        assert rows[2][1]["grad_norm/total"] == pytest.approx(1e18)

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_update_ratio(self, pl: Any, accumulate: int) -> None:
        weights: list[dict[str, torch.Tensor]] = []
        keep = lambda self, *args: weights.append(copy.deepcopy(self.state_dict()))  # noqa: E731
        module = runs.make_module(pl, on_train_start=keep, on_train_batch_end=keep)
        logger = runs.memory_logger(pl)
        monitor = GradNormMonitor(log_update_ratio=True)
        trainer = runs.trainer(pl, logger=logger, callbacks=[monitor], accumulate_grad_batches=accumulate)
        trainer.fit(module, runs.data())
        for index, (_, row) in enumerate(logger.rows):
            before, after = weights[index * accumulate], weights[(index + 1) * accumulate]
            for group in ("net.encoder", "net.head"):
                names = [name for name in before if name.startswith(group + ".")]
                size = sum(float(before[n].double().pow(2).sum()) for n in names) ** 0.5
                change = sum(float((after[n].double() - before[n]).pow(2).sum()) for n in names) ** 0.5
                assert row[f"update_ratio/{group}"] == pytest.approx(change / size, rel=1e-3)

    def test_update_ratio_is_measured_on_logged_steps_alone(self, pl: Any) -> None:
        rows = fit_scripted(pl, [1.0] * 6, GradNormMonitor(every_n_steps=3, log_update_ratio=True))
        assert ["update_ratio/net" in row for _, row in rows] == [True, True]
        assert all("update_ratio/net" not in row for _, row in fit_scripted(pl, [1.0] * 2, GradNormMonitor()))

    def test_a_group_that_is_called_like_a_key_keeps_apart(self, pl: Any) -> None:
        net = torch.nn.ModuleDict({"total": torch.nn.Linear(6, 3)})
        module = runs.make_module(pl, torch.nn.Identity())
        module.total = net["total"]
        module.training_step = lambda batch, batch_idx: module.total(batch[0]).pow(2).mean()
        logger = runs.memory_logger(pl)
        runs.trainer(pl, logger=logger, callbacks=[GradNormMonitor()], max_steps=1).fit(module, runs.data())
        assert logger.rows[0][1]["grad_norm/total.group"] == logger.rows[0][1]["grad_norm/total"] > 0


class TestRisingNorm:
    STEADY = [1.0, 1.1, 0.9, 1.05, 0.95] * 14

    def fit(self, pl: Any, norms: list[float], tmp_path: Path) -> tuple[list[str], list[dict[str, Any]]]:
        logger = pl.loggers.CSVLogger(tmp_path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit_scripted(pl, norms, GradNormMonitor(), logger=logger)
        messages = [str(w.message) for w in caught if "gradient norm is rising" in str(w.message)]
        return messages, runs.incidents(logger.log_dir)

    def test_is_called_out_once_a_stretch_with_step_group_and_ratio(self, pl: Any, tmp_path: Path) -> None:
        rise = [1.5**i for i in range(1, 20)]
        messages, events = self.fit(pl, self.STEADY + rise + self.STEADY + rise, tmp_path)
        assert len(messages) == len(events) == 2
        assert "group `net` grew most" in messages[0]
        assert f"step {events[0]['step']}" in messages[0]
        first = events[0]
        assert (first["event"], first["rank"], first["epoch"]) == ("gradient_norm_rising", 0, 0)
        assert len(self.STEADY) < first["step"] < len(self.STEADY) + 10, "long before the explosion"
        assert 3.0 < first["ratio"] < 30.0
        assert first["norm"] == pytest.approx(rise[first["step"] - len(self.STEADY)], rel=1e-6)

    def test_noise_and_single_spikes_are_not(self, pl: Any, tmp_path: Path) -> None:
        norms = self.STEADY * 2
        norms[80] = norms[100] = norms[101] = 50.0
        messages, events = self.fit(pl, norms, tmp_path)
        assert (messages, events) == ([], [])

    @pytest.mark.parametrize("start", [0, 30, 200])
    def test_a_slow_rise_in_noise_is_called_out(self, pl: Any, tmp_path: Path, start: int) -> None:
        logs = np.random.default_rng(0).normal(0, 0.5, size=start + 100) + 0.047 * np.arange(-start, 100).clip(0)
        messages, [event] = self.fit(pl, np.exp(logs).tolist(), tmp_path)
        assert len(messages) == 1
        assert event["step"] > start

    def test_falling_is_not(self, pl: Any, tmp_path: Path) -> None:
        assert self.fit(pl, [100 * 0.97**i for i in range(150)], tmp_path)[0] == []


class TestResume:
    @pytest.mark.parametrize("stop_at", [7, 64])
    def test_goes_on_as_if_it_had_not_been_stopped(self, pl: Any, tmp_path: Path, stop_at: int) -> None:
        torch.manual_seed(5)
        norms = (torch.rand(60) + 0.5).tolist() + [1.5**i for i in range(20)]
        norms[3] = float("nan")

        def save(self: Any, *args: Any) -> None:
            if self.trainer.global_step == stop_at and not (tmp_path / "half.ckpt").exists():
                self.trainer.save_checkpoint(tmp_path / "half.ckpt")

        def run(checkpoint: Any) -> tuple[list[Any], list[str]]:
            logger = runs.memory_logger(pl)
            monitor = GradNormMonitor(every_n_steps=5)
            trainer = runs.trainer(pl, logger=logger, callbacks=[monitor], max_steps=80, max_epochs=-1)
            module = scripted(pl, norms, on_train_batch_end=save)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trainer.fit(module, runs.data(2 * len(norms)), ckpt_path=checkpoint)
            return logger.rows, [str(w.message) for w in caught if "rising" in str(w.message)]

        rows, warned = run(None)
        rows_resumed, warned_resumed = run(tmp_path / "half.ckpt")
        assert len(warned) == 1
        assert rows_resumed == [row for row in rows if row[0] >= stop_at]
        assert warned_resumed == warned

    def test_state_loads_with_weights_only(self, pl: Any, tmp_path: Path) -> None:
        logger = runs.memory_logger(pl)
        trainer = runs.trainer(pl, logger=logger, callbacks=[GradNormMonitor()])
        trainer.fit(runs.make_module(pl), runs.data())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["GradNormMonitor"]
        json.dumps(state)
        assert state["optimizers"][0]["nonfinite_steps"] == 0

    def test_of_another_model_starts_afresh(self, pl: Any) -> None:
        monitor = GradNormMonitor(every_n_steps=1)
        fit_scripted(pl, [1.0, float("nan")], monitor)
        state = monitor.state_dict()
        other = GradNormMonitor()
        other.load_state_dict(state)
        logger = runs.memory_logger(pl)
        runs.trainer(pl, logger=logger, callbacks=[other]).fit(runs.make_module(pl), runs.data())
        assert logger.rows[-1][1]["grad_norm/nonfinite_steps"] == 1  # a count of the run, not of its groups


class TestLifeInATrainer:
    def test_without_a_logger_it_does_nothing(self, pl: Any) -> None:
        for options in ({"logger": False}, {"fast_dev_run": True, "logger": True}):
            seen = []
            module = runs.make_module(
                pl, on_train_batch_start=lambda self, b, i, seen=seen: seen.append(session_of(self.trainer))
            )
            runs.trainer(pl, callbacks=[GradNormMonitor()], **options).fit(module, runs.data())
            assert set(seen) == {None}

    def test_second_fit_and_two_trainers_one_after_the_other(self, pl: Any) -> None:
        monitor, module = GradNormMonitor(), runs.make_module(pl)
        for _ in range(2):
            logger = runs.memory_logger(pl)
            trainer = runs.trainer(pl, logger=logger, callbacks=[monitor])
            trainer.fit(module, runs.data())
            trainer.fit_loop.max_epochs = 2
            trainer.fit(module, runs.data())
            assert len(logger.rows) == 8
            assert session_of(trainer) is None
            assert not set(vars(trainer.strategy.precision_plugin)) & {"optimizer_step", "pre_backward"}

    def test_a_fit_that_died_leaves_nothing_behind(self, pl: Any) -> None:
        def training_step(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 2:
                raise RuntimeError("died")
            return self.net(batch[0]).mean()

        module = runs.make_module(pl, training_step=training_step)
        trainer = runs.trainer(pl, logger=runs.memory_logger(pl), callbacks=[GradNormMonitor()])
        with pytest.raises(RuntimeError, match="died"):
            trainer.fit(module, runs.data())
        assert session_of(trainer) is None
        assert "optimizer_step" not in vars(trainer.strategy.precision_plugin)
        assert not module.optimizers().optimizer._optimizer_step_pre_hooks

    def test_copies_and_pickles(self, pl: Any) -> None:
        copies = []

        def on_train_batch_end(self: Any, *args: Any) -> None:
            monitor = next(c for c in self.trainer.callbacks if isinstance(c, GradNormMonitor))
            copies.extend([copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))])

        monitor = GradNormMonitor(group_depth=1)
        logger = runs.memory_logger(pl)
        module = runs.make_module(pl, on_train_batch_end=on_train_batch_end)
        runs.trainer(pl, logger=logger, callbacks=[monitor], max_steps=1).fit(module, runs.data())
        for copied in copies:
            assert (copied.group_depth, copied.session) == (1, None)
            runs.trainer(pl, logger=logger, callbacks=[copied], max_steps=1).fit(runs.make_module(pl), runs.data())
        assert len(logger.rows) == 3

    def test_learning_rate_finder_steps_are_not_the_runs(self, pl: Any) -> None:
        finder = pl.callbacks.LearningRateFinder(num_training_steps=5, update_attr=False)
        logger = runs.memory_logger(pl)
        trainer = runs.trainer(pl, logger=logger, callbacks=[GradNormMonitor(), finder], enable_checkpointing=True)
        module = runs.make_module(pl)
        module.lr = 1e-3
        trainer.fit(module, runs.data())
        assert [step for step, _ in logger.rows] == [0, 1, 2, 3]

    def test_validate_alone_sets_nothing_up(self, pl: Any) -> None:
        module = runs.make_module(pl, validation_step=lambda self, batch, batch_idx: None)
        trainer = runs.trainer(pl, logger=runs.memory_logger(pl), callbacks=[GradNormMonitor()])
        trainer.validate(module, runs.data(), verbose=False)
        assert session_of(trainer) is None

    def test_changes_no_result(self, pl: Any) -> None:
        weights = []
        for callbacks in ([], [GradNormMonitor(log_update_ratio=True)]):
            module = runs.make_module(pl)
            runs.trainer(pl, logger=runs.memory_logger(pl), callbacks=callbacks).fit(module, runs.data())
            weights.append(torch.nn.utils.parameters_to_vector(module.parameters()).detach())
        assert torch.equal(*weights)

    def test_two_loggers(self, pl: Any, tmp_path: Path) -> None:
        memory = runs.memory_logger(pl)
        csv = pl.loggers.CSVLogger(tmp_path)
        runs.trainer(pl, logger=[memory, csv], callbacks=[GradNormMonitor()]).fit(runs.make_module(pl), runs.data())
        assert len(memory.rows) == 4
        assert "grad_norm/total" in (Path(csv.log_dir) / "metrics.csv").read_text()

    @pytest.mark.parametrize(
        "options", [{"group_depth": 0}, {"group_depth": "2"}, {"every_n_steps": 0}, {"every_n_steps": True}]
    )
    def test_bad_options_are_refused(self, pl: Any, options: dict[str, Any]) -> None:
        misconfiguration = pl.utilities.exceptions.MisconfigurationException
        with pytest.raises(misconfiguration, match=f"{next(iter(options))}=.*expected a whole number"):
            GradNormMonitor(**options)


def test_the_last_steps_before_an_exception_are_logged(pl: Any) -> None:
    class Dies(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                raise ValueError("Input contains NaN")

    logger = runs.memory_logger(pl)
    run = runs.trainer(pl, logger=logger, callbacks=[GradNormMonitor(), Dies()])
    with pytest.raises(ValueError, match="Input contains NaN"):
        run.fit(runs.make_module(pl), runs.data())
    assert [step for step, row in logger.rows if "grad_norm/total" in row] == [0, 1, 2]


def charts_of(events: Any) -> dict[str, list[str]]:
    from tensorboard.plugins.custom_scalar import layout_pb2

    [tensor] = [e.tensor_proto.string_val[0] for e in events.Tensors("custom_scalars__config__")]
    layout = layout_pb2.Layout.FromString(tensor)
    return {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}


@pytest.mark.parametrize(("clip", "scaled"), [(None, False), (1.0, True)])
def test_there_are_charts_of_what_the_run_has_and_no_empty_ones(
    pl: Any, tmp_path: Path, clip: float | None, scaled: bool
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = pl.loggers.TensorBoardLogger(tmp_path)
    options: dict[str, Any] = {"plugins": runs.fp16(pl)} if scaled else {}
    run = runs.trainer(pl, logger=logger, callbacks=[GradNormMonitor()], gradient_clip_val=clip, **options)
    run.fit(runs.make_module(pl), runs.data())
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    expected = {"norm by group", "total"} | ({"clip coefficient", "loss scale"} if scaled else set())
    assert set(charts_of(events)) == expected


def test_tensorboard_gets_values_and_one_chart_of_the_groups(pl: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = pl.loggers.TensorBoardLogger(tmp_path)
    module = runs.make_module(pl)
    runs.trainer(pl, logger=logger, callbacks=[GradNormMonitor()], gradient_clip_val=1.0).fit(module, runs.data())
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    totals = [runs.reference_norms(copies, 2)["total"] for copies in module.copies]
    assert [e.value for e in events.Scalars("grad_norm/total")] == pytest.approx(totals, rel=1e-4)
    assert charts_of(events)["norm by group"] == [r"^grad_norm/net\.encoder$", r"^grad_norm/net\.head$"]
