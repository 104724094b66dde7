"""InputCheck in real runs: what it says, where it writes it, and that it leaves everything else as it was."""

import copy
import csv
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_stability import FractionalCheckpoint, InputCheck, InputError
from lightning_stability._compat import MisconfigurationException
from lightning_stability.callbacks.input_report import MOST_WARNINGS
from lightning_stability.cli import main
from lightning_stability.flagged_inputs import COLUMNS, FILE_NAME, FlaggedInput, append_flagged
from lightning_stability.health.inputs import InputMeter
from lightning_stability.runtime import session_of
from tests import runs

one = runs.load_namespace("pytorch_lightning")


class Samples(Dataset[Any]):
    """24 samples with their number; `spoil` makes some of them bad."""

    def __init__(self, spoil: dict[int, float]) -> None:
        self.spoil = spoil

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = torch.randn(6, generator=torch.Generator().manual_seed(index)) * self.spoil.get(index, 1.0)
        return {"x": x, "number": index, "name": f"sample-{index}"}


def loader(spoil: dict[int, float] | None = None, cls: Any = DataLoader, **options: Any) -> Any:
    torch.manual_seed(1)
    return cls(Samples(spoil or {}), **{"batch_size": 4, "shuffle": True, **options})


def make_module(pl: Any, **overrides: Any) -> Any:
    steps = {
        "training_step": lambda self, batch, batch_idx: self.net(batch["x"]).float().pow(2).mean(),
        "on_before_optimizer_step": lambda self, optimizer: None,
    }
    return runs.make_module(pl, **{**steps, **overrides})


def fit(
    pl: Any, callback: Any, data: Any, module: Any = None, callbacks: Any = (), **options: Any
) -> tuple[list[str], Any]:
    """Train; what was said by warnings, and the Trainer."""
    trainer = runs.trainer(pl, callbacks=[*callbacks, callback], **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module or make_module(pl), data)
    return [str(w.message) for w in caught if str(w.message).startswith("InputCheck")], trainer


def infos(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.message.startswith("InputCheck")]


class TestWhatIsSaid:
    def test_a_clean_run_is_silent_but_for_its_summary(self, pl: Any, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO")
        said, _ = fit(pl, InputCheck(), loader())
        assert said == []
        look, summary = infos(caplog)
        assert "measured 5 layers in the first batch" in look
        assert "6 batches looked at, 0 flagged; largest magnitudes of `batch['x']`" in summary
        assert "std of `batch['x']`" in summary

    def test_a_bad_sample_is_named_by_batch_position_dataset_index_and_description(self, pl: Any) -> None:
        module = make_module(pl)
        module.describe_sample = lambda batch, index: f"{batch['name'][index]} of {batch['x']}"
        data = loader({7: 1e5})
        said, _ = fit(pl, InputCheck(), data, module)
        [message] = said
        order = list(_order())
        assert f"epoch 0, batch {order.index(7) // 4}: the std of `batch['x']` is" in message
        assert f"sample {order.index(7) % 4} (dataset index 7; sample-7 of None)" in message

    def test_each_kind_is_warned_of_once_and_counted(self, pl: Any, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO")
        bad = {9: math.nan, 14: 1e5, 17: math.nan, 20: 1e6}
        said, _ = fit(pl, InputCheck(max_abs=1e3), loader(bad, shuffle=False), max_epochs=3)
        assert len(said) == 3
        assert "18 batches looked at, 12 flagged (6 nonfinite, 6 max_abs, 6 scale)" in infos(caplog)[-1]

    @pytest.mark.parametrize("first", [math.nan, 0.0])
    def test_many_tensors_do_not_flood(self, first: float) -> None:
        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            return self.net(batch["0"]).pow(2).mean()

        values = [first] * 4 + [math.nan] * 4
        samples = [{str(i): torch.full((6,), value) for i in range(12)} for value in values]
        said, _ = fit(
            one, InputCheck(), DataLoader(samples, batch_size=4), make_module(one, training_step=training_step)
        )
        assert len(said) == MOST_WARNINGS

    def test_a_describe_sample_that_fails_ends_nothing(self) -> None:
        module = make_module(one)
        module.describe_sample = lambda batch, index: batch["missing"]
        said, trainer = fit(one, InputCheck(), loader({2: 1e5, 3: 1e5}), module)
        assert sum("describe_sample failed: KeyError" in message for message in said) == 1
        assert trainer.global_step == 6

    def test_a_training_step_that_fetches_for_itself_is_said_not_to_be_seen(self) -> None:
        def training_step(self: Any, dataloader_iter: Any) -> Any:
            batch, _, _ = next(dataloader_iter)
            return self.net(batch["x"]).pow(2).mean()

        said, _ = fit(one, InputCheck(), loader({1: math.nan}), make_module(one, training_step=training_step))
        assert len(said) == 1
        assert "sees no batch" in said[0]


def _order() -> Any:
    return [int(index) for batch in loader() for index in batch["number"]]


class TestRaise:
    def test_before_the_batch_is_trained_on(self, pl: Any) -> None:
        steps: list[int] = []

        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            steps.append(batch_idx)
            return self.net(batch["x"]).pow(2).mean()

        data = loader({9: math.inf}, shuffle=False)
        with pytest.raises(InputError, match=r"epoch 0, batch 2: `batch\['x'\]` holds 6 values that are not") as raised:
            fit(pl, InputCheck(action="raise"), data, make_module(pl, training_step=training_step))
        assert steps == [0, 1]
        error = raised.value
        assert (error.reason, error.tensor, error.step, error.epoch, error.batch_idx, error.rank, error.sample) == (
            "nonfinite", "batch['x']", 2, 0, 2, 0, 1,
        )  # fmt: skip

    def test_the_error_can_be_pickled(self) -> None:
        error = pickle.loads(pickle.dumps(InputError("why", "scale", "batch", 3, 1, 2, 0, 5)))
        assert (str(error), error.reason, error.sample) == ("why", "scale", 5)

    def test_on_the_command_line_it_is_status_1_and_no_traceback(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        words = "fit --model tests.callbacks.test_input_check.Cli --trainer.accelerator=cpu --trainer.logger=false"
        options = (
            "--trainer.enable_checkpointing=false --trainer.callbacks+=InputCheck --trainer.callbacks.action=raise"
        )
        assert main([*words.split(), *options.split()]) == 1
        error = capsys.readouterr().err
        assert "lightning-stability: error: InputCheck ended the run: epoch 0, batch 1" in error
        assert "Traceback" not in error


class Cli(one.LightningModule):
    """A module for the command line, whose second batch is bad."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(6, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch["x"]).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return loader({5: math.nan}, shuffle=False)


class TestWhatIsWritten:
    def test_every_flagged_batch_is_an_event_and_every_sample_a_row(self, pl: Any, tmp_path: Path) -> None:
        logger = pl.loggers.CSVLogger(tmp_path)
        module = make_module(pl)
        module.describe_sample = lambda batch, index: f"{batch['name'][index]}, of the train set"
        fit(
            pl, InputCheck(action="skip"), loader({9: 1e5, 10: 1e5, 21: math.nan}, shuffle=False), module, logger=logger
        )
        events = runs.incidents(logger.log_dir)
        flagged = [event for event in events if event["event"] == "input_flagged"]
        assert [(event["batch_idx"], event["action"]) for event in flagged] == [(2, "skip"), (5, "skip")]
        assert [finding["dataset_index"] for finding in flagged[0]["findings"]] in ([9, 10], [10, 9])
        skipped = [event for event in events if event["event"] == "update_skipped"]
        assert [(event["by"], event["step"]) for event in skipped] == [("InputCheck", 2), ("InputCheck", 5)]
        with (Path(logger.log_dir) / FILE_NAME).open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert tuple(rows[0]) == COLUMNS
        assert [(row["batch_idx"], row["dataset_index"], row["description"], row["reason"]) for row in rows[2:]] == [
            ("5", "21", "sample-21, of the train set", "nonfinite")
        ]

    @pytest.mark.parametrize("action", ["warn", "skip"])
    def test_without_a_log_folder_nothing_is_written(
        self, action: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        said, _ = fit(one, InputCheck(action=action), loader({3: math.nan}))
        assert len(said) == 1
        assert list(tmp_path.iterdir()) == []

    def test_rows_of_several_processes_come_out_whole_under_one_header(self, tmp_path: Path) -> None:
        context = torch.multiprocessing.get_context("fork")
        processes = [context.Process(target=_append, args=(tmp_path, rank)) for rank in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        with (tmp_path / FILE_NAME).open(newline="") as file:
            header, *rows = csv.reader(file)
        assert header == list(COLUMNS)
        assert sorted(tuple(row[1:3]) for row in rows) == sorted((str(b), str(r)) for b in range(50) for r in range(4))
        assert {row[5] for row in rows} == {'a "name", with\nall that'}
        assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]

    def test_the_logger_gets_range_and_deviation_under_the_step_they_belong_to(self, pl: Any) -> None:
        logger = runs.memory_logger(pl)
        data = loader(shuffle=False)
        fit(pl, InputCheck(), data, logger=logger, log_every_n_steps=2)
        values = [batch["x"] for batch in data]
        rows = [(step, row) for step, row in logger.rows if "input/std" in row]
        assert [step for step, _ in rows] == [1, 3, 5]
        for step, row in rows:
            assert row["input/abs_max"] == pytest.approx(float(values[step].abs().max()))
            assert row["input/std"] == pytest.approx(float(values[step].std(correction=0)), rel=1e-5)

    def test_several_tensors_are_logged_by_name(self) -> None:
        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]).pow(2).mean()

        logger = runs.memory_logger(one)
        data = DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 6), torch.randn(8)), batch_size=4)
        fit(one, InputCheck(), data, make_module(one, training_step=training_step), logger=logger)
        keys = {key for _, row in logger.rows for key in row}
        assert keys == {"input/0/abs_max", "input/0/std", "input/1/abs_max"}


def _append(folder: Path, rank: int) -> None:
    for batch in range(50):
        append_flagged(folder, [FlaggedInput(0, batch, rank, 1, None, 'a "name", with\nall that', "x", "scale", 2.0)])


class TestWhenItLooks:
    @pytest.mark.parametrize(("accumulate", "every"), [(1, 1), (1, 4), (2, 3)])
    def test_every_n_steps_counts_batches_over_the_run(
        self, accumulate: int, every: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Any] = []
        measure = InputMeter.measure
        monkeypatch.setattr(
            InputMeter, "measure", lambda self, batch: seen.append(batch["number"]) or measure(self, batch)
        )
        fit(
            one,
            InputCheck(every_n_steps=every),
            loader(shuffle=False),
            max_epochs=2,
            accumulate_grad_batches=accumulate,
        )
        firsts = [int(numbers[0]) for numbers in seen]
        assert firsts == [4 * (batch % 6) for batch in range(0, 12, every)]

    def test_16_true_is_looked_at_before_the_cast_and_others_after_the_modules_own_transfer_hook(self) -> None:
        def on_after_batch_transfer(self: Any, batch: Any, dataloader_idx: int) -> Any:
            return {**batch, "x": batch["x"] * 3}

        for options, magnitude in (({"precision": "16-true"}, 1e6), ({"precision": "32-true"}, 3e6)):
            check = InputCheck(max_abs=1e5)
            optimizer = lambda module: torch.optim.SGD(module.parameters(), lr=1e-3)  # noqa: E731
            module = make_module(one, optimizer=optimizer, on_after_batch_transfer=on_after_batch_transfer)
            said, _ = fit(one, check, loader({0: 1e6}, shuffle=False), module, limit_train_batches=1, **options)
            x = Samples({0: 1e6})[0]["x"]
            largest = float(x.abs().max()) / 1e6 * magnitude
            assert f"has a magnitude of {largest:.4g}, beyond max_abs=100000" in said[-1].replace("1e+05", "100000")
            assert check.state_dict()["counts"]["reasons"].keys() == {"max_abs"}

    def test_validation_batches_are_not_looked_at(self) -> None:
        check = InputCheck()
        module = make_module(one, validation_step=lambda self, batch, batch_idx: None)
        trainer = runs.trainer(one, callbacks=[check], precision="bf16-true", val_check_interval=2)
        trainer.fit(module, loader(), loader({0: math.nan}, shuffle=False))
        assert check.state_dict()["counts"]["looked"] == 6
        assert check.state_dict()["counts"]["flagged"] == 0

    def test_batches_without_floating_tensors_pass_with_a_hint_and_empty_ones_without(self) -> None:
        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            return self.net(torch.ones(2, 6)).pow(2).mean()

        images = {"image": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "label": torch.tensor([0, 1])}
        hints = "(`batch['image']` is uint8, `batch['label']` is int64)", "(nor any other)"
        for batch, hint in ((images, hints[0]), (torch.zeros(0, 6), None), ({"a": "text"}, hints[1])):
            for action in ("warn", "skip", "raise"):
                data = DataLoader([batch] * 3, batch_size=None)
                module = make_module(one, training_step=training_step)
                said, trainer = fit(one, InputCheck(action=action), data, module)
                assert (len(said), trainer.global_step) == (0 if hint is None else 1, 3)
                assert hint is None or f"the first batch holds no floating tensor {hint}, so" in said[0]


class TestResuming:
    def test_the_usual_scale_and_the_counts_resume_and_no_index_is_guessed(self, tmp_path: Path) -> None:
        """Saved after batch 3 of 6; sample 20, in batch 5, is a thousand times too large."""
        data = lambda: loader({20: 1e3}, StatefulDataLoader, shuffle=False)  # noqa: E731
        save = FractionalCheckpoint(every_n_epochs=0.5, dirpath=tmp_path, save_top_k=-1)
        fit(one, InputCheck(), data(), callbacks=[save], enable_checkpointing=True)
        [path] = tmp_path.glob("*000.50*.ckpt")
        torch.load(path, weights_only=True)
        check = InputCheck()
        trainer = runs.trainer(one, callbacks=[FractionalCheckpoint(dirpath=tmp_path / "again"), check],
                               enable_checkpointing=True, max_epochs=2)  # fmt: skip
        with pytest.warns(UserWarning, match="times its usual") as caught:
            trainer.fit(make_module(one), data(), ckpt_path=path)
        [message] = [str(w.message) for w in caught if "times its usual" in str(w.message)]
        assert "epoch 0, batch 5" in message
        assert "dataset index" not in message, "the loader went on in the middle of an epoch"
        counts = check.state_dict()["counts"]
        assert (counts["looked"], counts["flagged"]) == (12, 2)

    def test_a_loader_with_indices_resumes_exactly_as_one_without_the_check(self, tmp_path: Path) -> None:
        weights = []
        for name, callbacks in (("bare", []), ("checked", [InputCheck()])):
            for resume in (None, "half"):
                folder = tmp_path / name
                save = FractionalCheckpoint(every_n_epochs=0.5, dirpath=folder if resume is None else folder / "2")
                save.save_top_k = -1
                trainer = runs.trainer(one, callbacks=[*copy.deepcopy(callbacks), save], enable_checkpointing=True,
                                       max_epochs=2)  # fmt: skip
                path = None if resume is None else next(folder.glob("*000.50*.ckpt"))
                module = make_module(one)
                torch.manual_seed(5)
                trainer.fit(module, loader(cls=StatefulDataLoader, num_workers=0), ckpt_path=path)
                weights.append(torch.nn.utils.parameters_to_vector(module.parameters()).detach())
        assert all(torch.equal(weights[0], other) for other in weights[1:])


class TestLiving:
    def test_twice_in_one_trainer_and_in_two_one_after_the_other(self, pl: Any) -> None:
        check = InputCheck()
        trainer = runs.trainer(pl, callbacks=[check])
        for _ in range(2):
            trainer.fit(make_module(pl), loader())
            assert check.state_dict()["counts"]["looked"] == 6
            trainer.fit_loop.max_epochs += 1
        assert session_of(trainer) is None
        fit(pl, check, loader())
        assert check.state_dict()["counts"]["looked"] == 6

    def test_copies_and_pickles_before_within_and_after_a_fit(self) -> None:
        copies: list[Any] = []

        class Copy(one.Callback):
            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                copies.append(copy.deepcopy(check))
                copies.append(pickle.loads(pickle.dumps(check)))

        check = InputCheck(max_abs=7.0, action="skip")
        copies.append(copy.deepcopy(check))
        fit(one, check, loader(), callbacks=[Copy()])
        copies.append(pickle.loads(pickle.dumps(check)))
        for other in (copies[0], copies[3], copies[-1]):
            assert (other.max_abs, other.action, other.guards) == (7.0, "skip", True)
            fit(one, other, loader())
            assert other.state_dict()["counts"]["looked"] == 6

    @pytest.mark.parametrize("options", [{"barebones": True}, {"fast_dev_run": True}, {"max_steps": 2}], ids=str)
    @pytest.mark.parametrize("action", ["warn", "skip"])
    def test_in_bare_and_short_runs(self, options: dict[str, Any], action: Any) -> None:
        bare = {"logger": None, "enable_checkpointing": None, "enable_progress_bar": None, "enable_model_summary": None,
                "log_every_n_steps": None} if "barebones" in options else {}  # fmt: skip
        said, _ = fit(one, InputCheck(action=action), loader({0: math.nan}, shuffle=False), **{**bare, **options})
        assert len(said) == 1

    @pytest.mark.parametrize("action", ["warn", "raise"])
    def test_only_skip_measures_gradients(self, action: Any) -> None:
        """A run with nothing but InputCheck pays for no pass over the gradients."""

        class Look(one.Callback):
            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                runtime = session_of(trainer)
                assert runtime is not None
                assert (runtime.pipeline.meters, runtime.pipeline.losses.batches) == ({}, 0)

        fit(one, InputCheck(action=action), loader(), callbacks=[Look()])

    @pytest.mark.parametrize(
        "options",
        [{"max_abs": 0}, {"max_abs": math.nan}, {"max_scale_ratio": 1.0}, {"max_scale_ratio": math.inf},
         {"action": "stop"}, {"every_n_steps": 0}, {"every_n_steps": 1.5}, {"every_n_steps": True}],
        ids=str,
    )  # fmt: skip
    def test_options_out_of_range_are_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(MisconfigurationException, match=rf"InputCheck\({next(iter(options))}="):
            InputCheck(**options)
