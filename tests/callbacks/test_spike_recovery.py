"""SpikeRecovery in real runs: what it skips, what it restores, and how a run ends that it cannot save."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_stability import NaNEarlyStop, NonFiniteError, SpikeRecovery
from lightning_stability._compat import Callback, MisconfigurationException
from lightning_stability.callbacks.spike_state import SpikeFit
from lightning_stability.events import read_events
from tests import runs
from tests.test_distributed import two_ranks

FEATURES = 6


def make_data(batches: int, spikes: dict[int, float] | None = None, batch_size: int = 4) -> DataLoader:
    """Batches of unit scale; those in `spikes` are multiplied."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(batches * batch_size, FEATURES, generator=generator)
    for index, factor in (spikes or {}).items():
        x[index * batch_size : (index + 1) * batch_size] *= factor
    return DataLoader(TensorDataset(x), batch_size=batch_size)


class Net(nn.Module):
    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.a = nn.Linear(FEATURES, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.b = nn.Linear(8, 3)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(torch.relu(self.norm(self.a(x)))))


def make_module(pl: Any, optimizer: Any = None, norm: bool = True, **overrides: Any) -> Any:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = Net(norm)
            self.mean = MeanMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = (self.net(batch[0]).float() - batch[0][:, :3].float()).pow(2).mean()
            self.mean.update(loss.detach())
            self.log("loss", loss, on_step=False, on_epoch=True)
            self.log("mean", self.mean, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            opt = optimizer(self) if optimizer else torch.optim.AdamW(self.parameters(), lr=1e-3)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 200)
            return [opt], [{"scheduler": schedule, "interval": "step"}]

    for name, method in overrides.items():
        setattr(Module, name, method)
    return Module()


def state_of(trainer: Any, average: Any = None) -> dict[str, Any]:
    """Everything that a rewind restores, copied."""
    module = trainer.lightning_module
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    results = trainer.fit_loop.epoch_loop._results
    return copy.deepcopy(
        {
            "module": {**dict(module.named_parameters()), **dict(module.named_buffers())},
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "scaler": scaler.state_dict() if scaler is not None else None,
            "average": average._average_model.state_dict() if average is not None else None,
            "mean": (module.mean.mean_value, module.mean.weight, module.mean._update_count),
            "logged": {
                k: (r.value, r.cumulated_batch_size, r._update_count) for k, r in results.items() if r.is_tensor
            },
        }
    )


def assert_same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{index}]")
    else:
        assert a == b, where


class States(Callback):
    """Keeps the state at the end of every batch, after all other hooks."""

    def __init__(self, average: Any = None) -> None:
        self.average = average
        self.after: dict[int, Any] = {}
        self.after_batch: dict[int, Any] = {}

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.after[trainer.global_step] = state_of(trainer, self.average)
            self.after_batch[trainer.fit_loop.batch_idx] = self.after[trainer.global_step]


def breaks_weights_at(batch: int) -> Any:
    """A hook that makes a weight NaN before one batch of the run, once."""

    def on_train_batch_start(self: Any, data: Any, batch_idx: int) -> None:
        if self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1 == batch:
            with torch.no_grad():
                self.net.a.weight[0, 0] = float("nan")

    return on_train_batch_start


def fit(pl: Any, module: Any, data: Any, callbacks: list[Any], folder: Any, **options: Any) -> Any:
    logger = pl.loggers.CSVLogger(folder, name="", version="")
    trainer = runs.trainer(pl, callbacks=callbacks, logger=logger, default_root_dir=str(folder), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data)
    return trainer


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder) if event["event"] == name]


# The rewind.


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["32", "fp16"])
@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_a_rewind_restores_every_bit(one: Any, tmp_path: Path, precision: str, kind: str, accumulate: int) -> None:
    def run(folder: Path, **overrides: Any) -> tuple[States, Any]:
        torch.manual_seed(3)
        average = one.callbacks.WeightAveraging()
        states = States(average)
        module = make_module(one, lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, **{kind: True}), **overrides)
        plugins = runs.fp16(one, init_scale=1024.0, growth_interval=7) if precision == "fp16" else None
        recovery = SpikeRecovery(every_n_steps=5)
        options = {"plugins": plugins, "accumulate_grad_batches": accumulate}
        fit(one, module, make_data(48), [recovery, average, states], folder, **options)
        return states, recovery

    usual, _ = run(tmp_path / "usual")
    broken, recovery = run(tmp_path / "broken", on_train_batch_start=breaks_weights_at(20 * accumulate))
    [rewound] = events(tmp_path / "broken", "rewound")
    assert (recovery.rewinds, rewound["from_step"]) == (1, 21)
    assert rewound["to_step"] == 5
    assert_same(broken.after[21], usual.after[5])


def test_the_event_names_the_samples_left_out(pl: Any, tmp_path: Path) -> None:
    module = make_module(pl, on_train_batch_start=breaks_weights_at(20))
    fit(pl, module, make_data(30), [SpikeRecovery(every_n_steps=5)], tmp_path)
    [rewound] = events(tmp_path, "rewound")
    left = rewound["left_out"]
    assert (left["batches"], left["first"], left["last"]) == (16, [0, 5], [0, 20])
    assert left["samples"] == list(range(5 * 4, 21 * 4))


def test_a_rewind_into_the_epoch_before_begins_its_metrics_anew(one: Any, tmp_path: Path) -> None:
    module = make_module(one, on_train_batch_start=breaks_weights_at(22))
    trainer = fit(one, module, make_data(20), [SpikeRecovery(every_n_steps=5)], tmp_path, max_epochs=2)
    [rewound] = events(tmp_path, "rewound")
    assert rewound["to_step"] == 5
    assert torch.isfinite(trainer.callback_metrics["loss"])
    assert torch.isfinite(trainer.callback_metrics["mean"])


def steps_by_itself(accumulate: int) -> Any:
    """A training step with two optimizers, which step in every so-many-th batch."""

    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        loss = (self.net(batch[0]) - batch[0][:, :3]).pow(2).mean()
        self.mean.update(loss.detach())
        self.log("loss", loss.detach(), on_step=False, on_epoch=True)
        self.manual_backward(loss)
        if (batch_idx + 1) % accumulate == 0:
            for optimizer, schedule in zip(self.optimizers(), self.lr_schedulers(), strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()

    return training_step


def two_optimizers(self: Any) -> Any:
    made = [
        torch.optim.AdamW(self.net.a.parameters(), lr=1e-3),
        torch.optim.SGD([*self.net.norm.parameters(), *self.net.b.parameters()], lr=1e-2, momentum=0.9),
    ]
    return made, [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200) for optimizer in made]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_manual_optimization_goes_back_between_two_batches(one: Any, tmp_path: Path, accumulate: int) -> None:
    def run(folder: Path, **overrides: Any) -> States:
        torch.manual_seed(3)
        methods = {"training_step": steps_by_itself(accumulate), "configure_optimizers": two_optimizers, **overrides}
        module, states = make_module(one, **methods), States()
        module.automatic_optimization = False
        fit(one, module, make_data(60), [SpikeRecovery(every_n_steps=10), states], folder)
        return states

    usual = run(tmp_path / "usual")
    broken = run(tmp_path / "broken", on_train_batch_start=breaks_weights_at(41))
    [rewound] = events(tmp_path / "broken", "rewound")
    (_, first), (_, last) = rewound["left_out"]["first"], rewound["left_out"]["last"]
    assert 0 < rewound["to_step"] < rewound["from_step"]
    assert_same(broken.after_batch[last], usual.after_batch[first - 1])


# The hole.


def optimizers(kind: str) -> Any:
    return lambda module: torch.optim.Adam(module.parameters(), lr=1e-2, eps=0.0, **({kind: True} if kind else {}))


def dead_relu(self: Any, batch: Any, batch_idx: int) -> Tensor:
    hidden = torch.relu(self.net.a(batch[0])) * 0
    return self.net.b(hidden).float().pow(2).mean()


@pytest.mark.parametrize("kind", ["", "foreach", "fused"])
@pytest.mark.parametrize("patience", [None, 0, 3])
def test_weights_made_nonfinite_of_finite_gradients_never_stay(
    one: Any, tmp_path: Path, kind: str, patience: int | None
) -> None:
    module = make_module(one, optimizers(kind), norm=False, training_step=dead_relu)
    callbacks = [SpikeRecovery(), *([] if patience is None else [NaNEarlyStop(patience)])]
    trainer = runs.trainer(one, callbacks=callbacks, max_epochs=5)
    with pytest.warns(UserWarning, match="ended the run") as said:
        trainer.fit(module, make_data(20))
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert callbacks[0].rewinds == 3
    [end] = [str(w.message) for w in said if "ended the run" in str(w.message)]
    assert "eps=0" in end
    assert "net.a.weight" in end
    assert "parameters and buffers are finite" in end
    assert trainer.global_step < 20


def test_a_learning_rate_that_becomes_nan_ends_the_run_by_name(one: Any, tmp_path: Path) -> None:
    def configure_optimizers(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1.0 if i < 3 else float("nan"))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    module = make_module(one, configure_optimizers=configure_optimizers)
    trainer = fit(one, module, make_data(60), [SpikeRecovery(), NaNEarlyStop()], tmp_path)
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    [stopped] = events(tmp_path, "training_stopped")
    assert (stopped["by"], stopped["what"], stopped["rewinds"]) == ("SpikeRecovery", "optimizer", 3)
    assert "lr=nan" in stopped["why"]
    assert trainer.global_step < 30


def test_with_action_raise_the_end_is_an_exception(one: Any) -> None:
    module = make_module(one, optimizers("foreach"), norm=False, training_step=dead_relu)
    trainer = runs.trainer(one, callbacks=[SpikeRecovery(max_rewinds=1), NaNEarlyStop(action="raise")])
    with pytest.raises(NonFiniteError, match="after 1 rewind it came again"):
        trainer.fit(module, make_data(20))


def test_no_checkpoint_is_saved_with_weights_that_just_became_nonfinite(one: Any, tmp_path: Path) -> None:
    def on_before_zero_grad(self: Any, optimizer: Any) -> None:
        pass

    def on_train_batch_end(self: Any, *args: Any) -> None:  # the module's hook comes after the session's
        if self.trainer.global_step == 20:
            with torch.no_grad():
                self.net.a.weight[0, 0] = float("nan")

    class Breaks(one.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            on_train_batch_end(module)

    module = make_module(one)
    saves = one.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=20, save_top_k=-1)
    recovery = SpikeRecovery(every_n_steps=5)
    fit(one, module, make_data(30), [recovery, Breaks(), saves], tmp_path, enable_checkpointing=True)
    [path] = list(tmp_path.glob("*.ckpt"))
    saved = torch.load(path, weights_only=False)
    assert all(bool(tensor.isfinite().all()) for tensor in saved["state_dict"].values())
    assert recovery.rewinds == 1


# The spike.


@pytest.mark.parametrize("kind", ["fused", "foreach"])
@pytest.mark.parametrize("precision", ["32", "fp16"])
def test_a_step_that_spikes_is_skipped(one: Any, tmp_path: Path, kind: str, precision: str) -> None:
    def run(spikes: dict[int, float], folder: Path) -> tuple[States, Any]:
        torch.manual_seed(3)
        states, recovery = States(), SpikeRecovery()
        module = make_module(one, lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, **{kind: True}), norm=False)
        plugins = runs.fp16(one, init_scale=16.0) if precision == "fp16" else None
        fit(one, module, make_data(70, spikes), [recovery, states], folder, plugins=plugins)
        return states, recovery

    states, recovery = run({60: 30.0, 61: 30.0}, tmp_path)
    assert recovery.spikes == 2
    skipped = events(tmp_path, "update_skipped")
    found = [(event["step"], event["by"], event["what"]) for event in skipped]
    assert found == [(60, "spike", "spike"), (61, "spike", "spike")]
    assert "usual" in skipped[0]["why"]
    before, after = states.after[60], states.after[62]
    for name in ("module", "mean", "logged"):
        assert_same(after[name], before[name], name)
    assert_same(after["optimizers"][0]["state"], before["optimizers"][0]["state"])
    assert recovery.rewinds == 0


def test_a_limit_beyond_single_precision_is_none() -> None:
    recovery, limit = SpikeRecovery(), torch.zeros(())
    usual, fit_of_it = recovery._range(0), SpikeFit(limits={0: [limit]})
    usual.norm.limit = 1e300
    fit_of_it.set_limits(0, usual)
    assert float(limit) == float("inf")


def test_a_spike_writes_no_running_statistics(one: Any, tmp_path: Path) -> None:
    states = States()
    fit(one, make_module(one), make_data(70, {60: 1000.0}), [SpikeRecovery(), states], tmp_path)
    assert_same(states.after[61]["module"], states.after[60]["module"])


def test_a_run_without_spikes_is_bitwise_the_same(one: Any, tmp_path: Path) -> None:
    finals = []
    for callbacks in ([], [SpikeRecovery(every_n_steps=5)]):
        torch.manual_seed(3)
        states = States()
        trainer = fit(one, make_module(one), make_data(60), [*callbacks, states], tmp_path, max_epochs=2)
        finals.append((states.after[120], dict(trainer.callback_metrics)))
    assert_same(finals[1], finals[0])


def test_a_loss_that_stays_up_makes_the_run_go_back(one: Any, tmp_path: Path) -> None:
    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1 == 100:
            with torch.no_grad():
                self.net.b.weight[0, 0] *= 2.0**12  # a flipped bit of the exponent

    module = make_module(one, on_train_batch_start=on_train_batch_start, norm=False)
    recovery = SpikeRecovery(every_n_steps=10)
    fit(one, module, make_data(150), [recovery], tmp_path)
    [rewound] = events(tmp_path, "rewound")
    assert 75 <= rewound["to_step"] < 100 < rewound["from_step"] <= 120
    assert "the loss was" in rewound["why"]
    assert float(module.net.b.weight.abs().max()) < 2.0


def rate_at(batch: int, rate: float) -> Any:
    """A hook that gives one update another learning rate."""

    def on_before_optimizer_step(self: Any, optimizer: Any) -> None:
        [group] = optimizer.param_groups
        self.usual = getattr(self, "usual", group["lr"])
        group["lr"] = rate if self.trainer.fit_loop.epoch_loop.total_batch_idx == batch else self.usual

    return on_before_optimizer_step


@pytest.mark.parametrize("rate", [1e6, 10.0])
def test_one_update_with_an_absurd_learning_rate_is_gone_back_behind(one: Any, tmp_path: Path, rate: float) -> None:
    def run(folder: Path, **overrides: Any) -> float:
        module = make_module(one, lambda m: torch.optim.SGD(m.parameters(), lr=1e-2), norm=False, **overrides)
        fit(one, module, make_data(140), [SpikeRecovery(every_n_steps=20)], folder)
        return sum(float(p.detach().norm()) for p in module.parameters())

    usual = run(tmp_path / "usual")
    size = run(tmp_path / "absurd", on_before_optimizer_step=rate_at(80, rate))
    [rewound] = events(tmp_path / "absurd", "rewound")
    assert rewound["to_step"] <= 80 < rewound["from_step"]
    assert size == pytest.approx(usual, rel=0.2)


def test_a_schedule_that_starts_again_is_no_spike(one: Any, tmp_path: Path) -> None:
    def configure_optimizers(self: Any) -> Any:
        opt = torch.optim.SGD(self.parameters(), lr=1e-4)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 5.0 if step >= 100 else 1.0)
        return [opt], [{"scheduler": schedule, "interval": "step"}]

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        level = getattr(self, "level", 1.0)  # a loss that goes with the rate of the update before
        self.level = (self.optimizers().param_groups[0]["lr"] / 1e-4) ** 4
        return level * (self.net(batch[0]) - batch[0][:, :3]).pow(2).mean()

    module = make_module(one, configure_optimizers=configure_optimizers, training_step=training_step)
    saver = SpikeRecovery(every_n_steps=20)
    fit(one, module, make_data(200), [saver], tmp_path)
    assert (saver.spikes, saver.rewinds) == (0, 0)


def test_another_level_is_learned_where_nothing_is_rewound(one: Any, tmp_path: Path) -> None:
    recovery = SpikeRecovery(action="skip")
    data = make_data(120, dict.fromkeys(range(60, 120), 10.0))
    fit(one, make_module(one, norm=False), data, [recovery], tmp_path)
    assert recovery.spikes == 10


# A flipped bit.


def flips_bit(what: str, batch: int) -> Any:
    """A hook that makes one number of a layer 2^32 times as large before one batch of the run."""

    def on_train_batch_start(self: Any, data: Any, batch_idx: int) -> None:
        if self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1 == batch:
            weight = self.net.a.weight
            target = weight.data if what == "weight" else self.trainer.optimizers[0].state[weight][what]
            target[3, 2] = (target[3, 2].abs() + 1e-3) * 2.0**32

    return on_train_batch_start


@pytest.mark.parametrize("kind", ["fused", "foreach"])
@pytest.mark.parametrize("what", ["weight", "exp_avg"])
def test_a_flipped_bit_is_undone_and_costs_one_step(one: Any, tmp_path: Path, what: str, kind: str) -> None:
    optimizer = lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, **{kind: True})  # noqa: E731
    module = make_module(one, optimizer, norm=False, on_train_batch_start=flips_bit(what, 100))
    recovery = SpikeRecovery(every_n_steps=10)
    fit(one, module, make_data(150), [recovery], tmp_path)
    restored = events(tmp_path, "number_restored")
    assert {(event["parameter"], tuple(event["index"])) for event in restored} == {("net.a.weight", (3, 2))}
    assert what in {event["number"] for event in restored}
    assert all(abs(event["restored"]) < 1.0 < abs(event["was"]) for event in restored)
    assert (recovery.spikes, recovery.rewinds) == (1, 0)
    assert recovery.restored_numbers == len(restored)
    assert float(module.net.a.weight.abs().max()) < 1.0


# Resume.


def test_a_resumed_run_knows_its_range_and_its_counts(one: Any, tmp_path: Path) -> None:
    first = SpikeRecovery()
    trainer = fit(one, make_module(one, norm=False), make_data(60, {50: 30.0}), [first], tmp_path / "a")
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    second = SpikeRecovery()
    again = runs.trainer(one, callbacks=[second], max_epochs=2)
    again.fit(make_module(one, norm=False), make_data(60, {3: 30.0}), ckpt_path=tmp_path / "a.ckpt")
    assert (first.spikes, second.spikes) == (1, 2)


# Options.


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"sigma": 0}, "sigma=0"),
        ({"sigma": float("nan")}, "sigma=nan"),
        ({"window": 3}, "window=3"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"max_rewinds": 1.5}, "max_rewinds=1.5"),
        ({"action": "stop"}, "action='stop'"),
    ],
)
def test_a_bad_option_is_one_clear_error(options: dict[str, Any], found: str) -> None:
    with pytest.raises(MisconfigurationException, match="expected") as error:
        SpikeRecovery(**options)
    assert found in str(error.value)


# Several ranks.


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_skip_and_go_back_at_the_same_steps(tmp_path: Path, kind: str) -> None:
    script = Path(__file__).parents[1] / "distributed_spikes.py"
    first, second = two_ranks(tmp_path, kind, "pytorch_lightning", launch_both=True, script=script)
    assert first == second
    usual, broken = first["usual"], first["broken"]
    assert (usual["spikes"], usual["rewinds"]) == (1, 0)
    assert (broken["spikes"], broken["rewinds"]) == (1, 1)
    # after the rewind the weights are those of an undisturbed run at the snapshot's step
    back = 81 - broken["left_out"]
    assert broken["sums"][80] == usual["sums"][back - 1]
