"""Whatever a training step writes to, the look at the layers leaves no trace of it: one case for each kind of state."""

import array
import io
import random
from collections import Counter, OrderedDict, UserDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryPrecision

from lightning_stability import InputCheck
from tests import runs
from tests.rehearsed_module import differences

ONE = runs.load_namespace("pytorch_lightning")


class Slotted:
    __slots__ = ("__hidden", "count", "late")

    def __init__(self) -> None:
        self.count, self.__hidden = 0, list[bool]()

    def tell(self) -> Any:
        return self.count, self.__hidden

    def add(self) -> None:
        self.count += 1
        self.__hidden.append(hasattr(self, "late"))
        self.late = self.count


class SlottedMore(Slotted):
    __slots__ = ("more",)


@dataclass(frozen=True, slots=True)
class Frozen:
    count: int = 0

    def add(self) -> None:
        object.__setattr__(self, "count", self.count + 1)


@dataclass
class Average:
    """An EMA helper: with `__call__`, weights of its own, and an attribute of its class."""

    shadow: Tensor

    def __call__(self, weight: Tensor) -> None:
        set_attribute("calls", type)(self)
        self.shadow.mul_(0.5).add_(weight.detach(), alpha=0.5)


class Stubborn(dict[str, int]):
    """A dict that does something else than a dict in the methods that write to it."""

    extra = 0

    def __setitem__(self, key: str, value: int) -> None:
        super().__setitem__(key, value + 1)
        self.extra += 1


class InnerModule(ONE.LightningModule):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Data(ONE.LightningDataModule):
    def __init__(self, loader: Any) -> None:
        super().__init__()
        self.train_dataloader = lambda: loader


class Module(ONE.LightningModule):
    def __init__(self, case: "Case") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.case, self.averaged = nn.Linear(4, 4), [case], nn.Linear(4, 4)
        self.averaged.requires_grad_(False)
        case.make(self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        [case] = self.case
        case.step(self)
        return self.net(batch[0]).float().pow(2).mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=torch.tensor(1e-2))
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3)]


def nothing(module: Any) -> None:
    pass


@dataclass
class Case:
    """A kind of state.

    Attributes:
        name: Of it.
        step: What the training step does.
        tell: What has become of it, after the fit.
        make: Makes it.
    """

    name: str
    step: Callable[[Any], Any]
    tell: Callable[[Any], Any]
    make: Callable[[Any], Any] = nothing


def attribute(name: str, value: Callable[[], Any], step: Callable[[Any], Any], tell: Callable[[Any], Any]) -> Case:
    """Something that the module holds as `held`."""
    return Case(name, lambda m: step(m.held), lambda m: tell(m.held), lambda m: setattr(m, "held", value()))


def count_up(mapping: Any) -> None:
    mapping["n"] = mapping.get("n", 0) + 1


def set_attribute(name: str, of: Callable[[Any], Any] = lambda m: m) -> Callable[[Any], None]:
    return lambda m: setattr(of(m), name, getattr(of(m), name, 0) + 1)


def take(cls: type, name: str) -> Any:
    """An attribute of a class, which loses it."""
    value = getattr(cls, name)
    delattr(cls, name)
    return value


def write(stream: Any) -> None:
    stream.write("ab" if isinstance(stream, io.StringIO) else b"ab")


def counting() -> tuple[Callable[[], None], Callable[[], Any]]:
    count, calls = 0, []

    def step() -> None:
        nonlocal count
        count += 1
        calls.append(count)

    return step, lambda: (count, calls)


def counting_itself(module: Any) -> None:
    module.step_of_closure, module.tell_of_closure = counting()


def resize(tensor: Tensor) -> None:
    tensor.resize_(tensor.numel() + 3).fill_(len(tensor))


def step_metrics(module: Any) -> None:
    x = torch.rand(4, generator=module.generator)
    module.scores(x, torch.tensor([0, 1, 0, 1]))
    module.mean.update(x)
    module.mean.compute()


def make_metrics(module: Any) -> None:
    module.generator = torch.Generator().manual_seed(1)
    module.scores = MetricCollection([BinaryAccuracy(), BinaryPrecision()])
    module.mean = MeanMetric()


def tell_metrics(module: Any) -> Any:
    everything = [module.mean, *module.scores.values()]
    return [(m._update_count, m._computed, m._forward_cache, m.metric_state) for m in everything]


def log_from_below(module: Any) -> None:
    module.inner._current_fx_name = "training_step"
    module.inner.log("below", 1.0, on_epoch=True, reduce_fx="sum")
    super(Module, module).log("above", 1.0, on_epoch=True, reduce_fx="sum")
    ONE.LightningModule.log(module, "past_it", 1.0, on_epoch=True, reduce_fx="sum")


def add_to_gradient(weight: Tensor) -> None:
    weight.grad.add_(1.0)


def hook_once(module: Any) -> None:
    if not hasattr(module, "is_hooked"):
        module.is_hooked = True
        module.net.weight.register_hook(lambda gradient: 2.0 * gradient)
        module.net.weight.register_post_accumulate_grad_hook(add_to_gradient)
        module.net.register_forward_hook(lambda net, args, out: 3.0 * out)


def step_schedule(module: Any) -> None:
    optimizer = module.optimizers().optimizer
    optimizer.param_groups[0]["lr"].mul_(0.9)
    optimizer.param_groups[0]["mine"] = optimizer.param_groups[0].get("mine", 0) + 1
    optimizer.state["mine"] = {"n": optimizer.state["mine"].get("n", 0) + 1}
    if len(optimizer.param_groups) < 4:
        extra = nn.Parameter(torch.full((2,), float(len(optimizer.param_groups))))
        optimizer.add_param_group({"params": [extra]})
        optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(1)))
    module.lr_schedulers().step()


def tell_schedule(module: Any) -> Any:
    optimizer = module.trainer.optimizers[0]
    return [
        module.trainer.lr_scheduler_configs[0].scheduler.last_epoch,
        [(float(g["lr"]), g.get("mine"), len(g["params"])) for g in optimizer.param_groups],
        optimizer.state["mine"],
    ]


def change_trainer(module: Any) -> None:
    trainer = module.trainer
    trainer.times = [*getattr(trainer, "times", []), trainer.max_epochs]
    trainer.shared.append(1)
    trainer.fit_loop.max_epochs = 2
    trainer.callback_metrics["steps"] = trainer.callback_metrics.get("steps", 0) + torch.ones(())
    with trainer.profiler.profile("mine"):
        pass


def tell_trainer(module: Any) -> Any:
    trainer = module.trainer
    recorded = trainer.profiler.recorded_durations["mine"]
    return trainer.times, trainer.shared, dict(trainer.callback_metrics), len(recorded)


def stop(module: Any) -> None:
    module.stops = [*getattr(module, "stops", []), module.trainer.should_stop]
    module.trainer.should_stop = True


def make_extra_weight(module: Any) -> None:
    module.extra = nn.Parameter(torch.ones(2))


def backward(module: Any) -> None:
    torch.set_grad_enabled(True)
    module.extra.pow(2).sum().backward()


def change_others(module: Any) -> None:
    for held in (module.trainer.callbacks[-1], module.trainer.datamodule):
        held.n = getattr(held, "n", 0) + 1


def draw(module: Any) -> None:
    module.drawn = [*getattr(module, "drawn", []), torch.rand(()).item(), np.random.rand(), random.random()]
    torch.manual_seed(int(1e6 * module.drawn[-1]))


def make_in_another_dtype(module: Any) -> None:
    module.dtypes = [*getattr(module, "dtypes", []), torch.zeros(1).dtype]
    torch.set_default_dtype(torch.float64 if len(module.dtypes) == 1 else torch.float32)


CASES = [
    Case("a plain attribute", set_attribute("count"), lambda m: m.count),
    Case("an attribute of the class", set_attribute("shared", type), lambda m: take(type(m), "shared")),
    attribute("__slots__", SlottedMore, Slotted.add, Slotted.tell),
    attribute("a frozen dataclass with slots", Frozen, Frozen.add, lambda v: v.count),
    attribute("bytearray", bytearray, lambda v: v.extend(b"ab"), bytes),
    attribute("array.array", lambda: array.array("d"), lambda v: v.append(0.5), list),
    attribute("Counter", Counter, lambda v: v.update(["a"]), lambda v: [*v.items(), v["b"]]),
    attribute("defaultdict", lambda: defaultdict(list), lambda v: v["a"].append(1), lambda v: v["a"]),
    attribute("OrderedDict", OrderedDict, lambda v: (count_up(v), v.update({len(v): 0}), v.move_to_end("n")), list),
    attribute("UserDict", UserDict, count_up, dict),
    attribute("a dict of the user's own", lambda: Stubborn(n=5), count_up, lambda v: (dict(v), v.extra)),
    attribute("a stream in memory", io.BytesIO, write, lambda v: (v.getvalue(), v.tell())),
    attribute("a stream of text in memory", io.StringIO, write, lambda v: (v.getvalue(), v.tell())),
    attribute("partial", lambda: partial(print, []), lambda v: v.args[0].append(1), lambda v: v.args),
    attribute("resize_", lambda: torch.zeros(2), resize, Tensor.clone),
    attribute("in place", lambda: torch.zeros(2, 3), lambda v: v.t_().add_(1), Tensor.clone),
    attribute("an array that grows", lambda: np.zeros(2), lambda v: v.resize(len(v) + 1, refcheck=False), np.copy),
    attribute("set_", lambda: torch.zeros(2), lambda v: v.set_(torch.full((len(v) + 1,), 7.0)), Tensor.clone),
    attribute(
        "what stands on a tensor", lambda: nn.Parameter(torch.zeros(2)), set_attribute("steps"), lambda v: v.steps
    ),
    attribute(
        "an EMA helper",
        lambda: Average(torch.zeros(4, 4)),
        lambda v: v(torch.ones(4, 4)),
        lambda v: (v.shadow.clone(), take(Average, "calls")),
    ),
    Case(
        "what a function shares with the one around it",
        lambda m: m.step_of_closure(),
        lambda m: m.tell_of_closure(),
        counting_itself,
    ),
    Case("cached_property", lambda m: m.late, lambda m: m.late),
    Case(
        "requires_grad",
        lambda m: m.averaged.requires_grad_(not m.averaged.weight.requires_grad),
        lambda m: m.averaged.weight.requires_grad,
    ),
    Case("train and eval", lambda m: m.averaged.train(not m.averaged.training), lambda m: m.averaged.training),
    Case("hooks", hook_once, lambda m: [len(m.net._forward_hooks), len(m.net.weight._backward_hooks)]),
    Case("metrics", step_metrics, tell_metrics, make_metrics),
    Case(
        "self.log of a module within, and past the module's own",
        log_from_below,
        lambda m: (dict(m.trainer.callback_metrics), sorted(m.trainer.fit_loop.epoch_loop._results)),
        lambda m: setattr(m, "inner", InnerModule()),
    ),
    Case("the optimizer and its schedule", step_schedule, tell_schedule),
    Case("the Trainer", change_trainer, tell_trainer),
    Case("should_stop", stop, lambda m: m.stops),
    Case("random numbers and seeds", draw, lambda m: m.drawn),
    Case("a backward pass of its own", backward, lambda m: m.extra.grad, make_extra_weight),
    attribute("a bound method", lambda: Frozen().add, lambda v: v(), lambda v: v.__self__.count),
    Case(
        "a callback and the data module", change_others, lambda m: [m.trainer.callbacks[-1].n, m.trainer.datamodule.n]
    ),
    Case("the default dtype", make_in_another_dtype, lambda m: m.dtypes),
    Case(
        "the logger",
        lambda m: (m.logger.log_metrics({"by_hand": 1.0}, step=0), m.logger.experiment.add_scalar("a", 1)),
        lambda m: (m.logger.rows, m.logger.experiment.count),
    ),
]


class Count:
    count = 0

    def add_scalar(self, *args: Any) -> None:
        self.count += 1


Module.late = cached_property(lambda self: len(vars(self)))  # type: ignore[attr-defined]
Module.late.__set_name__(Module, "late")


def fit(case: Case, callbacks: list[Any]) -> list[Any]:
    torch.manual_seed(3)
    random.seed(4)
    np.random.seed(5)
    module = Module(case)
    logger = runs.memory_logger(ONE)
    logger.experiment = Count()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    trainer = runs.trainer(ONE, callbacks=[*callbacks, ONE.Callback()], logger=logger, profiler="simple")
    trainer.shared = []
    loader = torch.utils.data.DataLoader([[x], [x]], batch_size=None)
    trainer.fit(module, datamodule=Data(loader))
    for row in logger.rows:
        for key in [key for key in row[1] if key.startswith("input/")]:
            del row[1][key]
    logger.rows[:] = [row for row in logger.rows if row[1]]
    return [module.state_dict(), case.tell(module)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_what_a_training_step_writes_to_is_as_it_would_be_without_the_look(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    without = fit(case, [])
    with caplog.at_level("INFO"):
        result = fit(case, [InputCheck()])
    assert differences(without, result) == []
    assert "what the first batch is at" in caplog.text
    assert "the first training step itself is watched" not in caplog.text


def test_autocast_around_the_fit_keeps_no_weights_that_were_cast_without_gradients() -> None:
    results = []
    for callbacks in ([], [InputCheck()]):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(fit(Case("none", nothing, nothing), callbacks))
    assert differences(*results) == []


def test_a_training_step_that_asks_for_the_folder_of_the_logs_is_watched_and_writes_there_as_often_as_it_would(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = self.net(batch[0]).pow(2).mean()
        with (Path(self.trainer.log_dir) / "losses.txt").open("a") as file:
            file.write(f"{loss.item()}\n")
        return loss

    for folder, callbacks in (("without", []), ("with", [InputCheck()])):
        module = runs.make_module(ONE, training_step=training_step)
        logger = ONE.loggers.CSVLogger(str(tmp_path), name="", version=folder)
        logger.log_metrics({"made": 1.0})
        with caplog.at_level("INFO"):
            runs.trainer(ONE, callbacks=callbacks, logger=logger).fit(module, runs.data())
    assert (tmp_path / "with/losses.txt").read_text() == (tmp_path / "without/losses.txt").read_text()
    assert "`training_step` asks for the folder of the logs, where it may write files" in caplog.text
    assert "what the first batch is at 5 layers" in caplog.text


def test_the_loggers_name_and_version_are_what_they_are() -> None:
    case = Case("names", lambda m: m.names.append((m.logger.name, m.loggers[0].version)), lambda m: m.names)
    case.make = lambda m: setattr(m, "names", [])
    assert fit(case, [InputCheck()])[1] == 2 * [("memory", "0")]
