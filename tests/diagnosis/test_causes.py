"""What the zoo does not show: code that is compiled, faults that come once, budgets, and causes that stay unknown."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from lightning_stability.diagnosis import RecordedStep
from lightning_stability.diagnosis.investigation import investigate
from lightning_stability.diagnosis.report import as_text, cause_in_a_line, make_report
from lightning_stability.diagnosis.step import capture_state
from lightning_stability.recovery.random_state import RandomState
from tests.zoo.program import Module, Tensor


class Net(Module):
    """A layer, and a loss that a test gives."""

    def __init__(self, loss: Any = None) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.loss = loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(self.layer(batch), batch)


class Double(nn.Module):
    """(torch's own layers are not compiled by themselves.)"""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Compiled(Net):
    """A part of it is compiled by a test."""

    def __init__(self) -> None:
        super().__init__()
        self.after = Double()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.after(self.layer(batch)).pow(2).mean()


def step_of(module: nn.Module, batch: Any, **given: Any) -> RecordedStep:
    return RecordedStep(module, [batch], [RandomState.capture()], optimizers=[module.configure_optimizers()], **given)


def report_of(step: RecordedStep, **given: Any) -> dict[str, Any]:
    found = investigate(step, **given)
    return json.loads(json.dumps(make_report(found.origin is not None, found.origin, step.failed, **found.as_json())))


def wrong(graph: Any, inputs: Any) -> Any:
    """A compiler that makes something else of it."""
    return lambda *args: [out * torch.nan for out in graph(*args)]


@pytest.mark.parametrize("in_place", [True, False])
def test_code_that_is_finite_eagerly_and_not_compiled_is_named(in_place):
    module = Compiled()
    if in_place:
        module.after.compile(backend=wrong)
    else:
        module.after = torch.compile(module.after, backend=wrong)
    [cause] = report_of(step_of(module, torch.randn(3, 4)))["causes"]
    assert (cause["cause"], cause["module"]) == ("compiled_code", "after")
    exec(cause["remedy"], {"model": module, "torch": torch})
    assert module.after(torch.ones(2)).tolist() == [2, 2]


def test_a_compiled_step_that_is_finite_both_ways_has_an_unknown_cause():
    module = Compiled()
    module.after.compile(backend="eager")
    assert report_of(step_of(module, torch.randn(3, 4)))["causes"][0]["cause"] == "unknown"


def test_a_step_that_is_finite_now_was_a_transient_fault():
    step = step_of(Net(lambda out, batch: out.mean()), torch.randn(3, 4), trainer={"global_rank": 3})
    [cause] = report_of(step)["causes"]
    assert cause["cause"] == "transient"
    assert "rank 3" in cause["summary"]


def test_no_transient_fault_is_claimed_where_the_replay_may_be_another_step():
    step = step_of(Net(lambda out, batch: out.mean()), torch.randn(3, 4))
    assert report_of(step, may_differ=True)["causes"][0]["cause"] == "unknown"


def test_a_number_that_is_written_on_purpose_has_no_known_cause():
    step = step_of(Net(lambda out, batch: out.mean() + torch.full((), torch.nan)), torch.randn(3, 4))
    report = report_of(step)
    assert [cause["cause"] for cause in report["causes"]] == ["unknown"]
    assert {"precision", "learning rate"} <= {row["name"] for row in report["excluded"]}
    assert cause_in_a_line(report) is None


class Clock:
    """Seconds that pass when a step is run."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(Net):
    """Each run of its step takes a number of seconds of a clock's."""

    def __init__(self, clock: Clock, seconds: list[float]) -> None:
        super().__init__()
        self.clock, self.seconds = [clock], seconds

    def __deepcopy__(self, memo: Any) -> Slow:  # the copies of a replay share the clock
        made = Slow(self.clock[0], self.seconds)
        made.load_state_dict(self.state_dict())
        return made

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = torch.log(self.layer(batch).relu() * 0).mean()
        self.clock[0].now += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        return loss


@pytest.mark.parametrize(
    ("seconds", "budget", "trials"),
    [
        ([10.0], 45.0, 3),  # 10 s to look at the step, and three trials
        ([10.0], 15.0, 0),  # by the first replay's time a trial would end too late
        ([1.0, 1.0, 30.0], 60.0, 2),  # a third one might take 30 s as well
    ],
)
def test_a_trial_that_would_end_after_the_budget_is_not_begun(seconds, budget, trials):
    clock = Clock()
    tried: list[str] = []
    step = step_of(Slow(clock, list(seconds)), torch.randn(3, 4))
    found = investigate(step, budget_seconds=budget, clock=clock, progress=tried.append)
    assert found.origin is not None
    assert len(tried) == trials
    assert clock.now <= budget
    assert "other number formats" in found.not_tried
    assert "there was no time to try" in found.notes[0]


def test_with_time_for_all_nothing_is_left_out():
    clock = Clock()
    step = step_of(Slow(clock, [10.0, 1.0]), torch.randn(3, 4))  # a trial is faster than a look at every operation
    found = investigate(step, budget_seconds=22.0, clock=clock)
    assert not found.not_tried
    assert not found.notes


def test_a_diagnosis_leaves_everything_as_it_was():
    module = Net(lambda out, batch: (out - out).pow(2).sum(dim=1).sqrt().mean())
    step = step_of(module, torch.randn(5, 4), failed="gradient")
    module.layer.weight.grad = torch.ones(2, 4)
    torch.manual_seed(7)
    weights, options = copy.deepcopy(module.state_dict()), copy.deepcopy(step.optimizers[0].state_dict())
    batch, code = step.batches[0].clone(), Net.training_step.__code__
    assert investigate(step).causes[0].cause == "undefined_gradient"
    after = torch.rand(1)
    torch.manual_seed(7)
    assert after == torch.rand(1)
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert step.optimizers[0].state_dict() == options
    assert torch.equal(step.batches[0], batch)
    assert torch.equal(module.layer.weight.grad, torch.ones(2, 4))
    assert Net.training_step.__code__ is code


def test_the_smallest_set_of_modules_in_float32_is_found():
    class Deep(Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
            self.large = nn.Linear(64, 1, bias=False)
            nn.init.constant_(self.large.weight, 40.0)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            for layer in self.layers:
                batch = 1 + layer(batch).relu()
            return self.large(batch * 40).float().mean() * 1e-4

    step = step_of(Deep(), torch.randn(3, 64), precision="16-mixed", loss_scale=1.0)
    [overflow] = [cause for cause in investigate(step).causes if cause.cause == "fp16_overflow"]
    assert overflow.facts["modules"] == ["large"]
    assert overflow.remedy.startswith("m = model.large; m.forward = torch.autocast('cpu', enabled=False)(")


def test_columns_within_a_wild_sample_are_named():
    class Squares(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.layer(batch).pow(2).mean()

    batch = torch.randn(8, 4)
    batch[5, 2] = 3e21
    [first, *_] = investigate(step_of(Squares(), batch), dataset_indices=[list(range(40, 48))]).causes
    assert (first.cause, first.samples, first.dataset_indices) == ("extreme_sample", [5], [45])
    assert first.facts["columns"] == [2]
    assert first.remedy == "dataset = Subset(dataset, [i for i in range(len(dataset)) if i not in [45]])"


def test_an_epsilon_of_a_layer_is_proposed():
    module = Net(lambda out, batch: out.mean())
    module.layer = nn.LayerNorm(4, eps=0.0)
    batch = torch.randn(6, 4)
    batch[1] = 2.0
    [first, *_] = investigate(step_of(module, batch)).causes
    assert (first.cause, first.module, first.remedy) == ("undefined_operation", "layer", "model.layer.eps = 1e-05")


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_masked_row_within_torchs_own_attention_is_seen(need_weights):
    class Attention(Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, padding = batch
            scores = torch.zeros(len(x), 5).masked_fill(padding, float("-inf"))
            out, _ = self.attention(x, x, x, key_padding_mask=scores, need_weights=need_weights)
            return out.pow(2).mean()

    padding = torch.zeros(6, 5, dtype=torch.bool)
    padding[4] = True
    found = investigate(step_of(Attention(), (torch.randn(6, 5, 8), padding)))
    if found.outcome.failure is None:
        pytest.skip("this version of torch gives 0 for a row whose keys are all masked")
    assert (found.causes[0].cause, found.causes[0].samples) == ("masked_attention", [4])


def test_a_report_is_at_most_twenty_lines_with_the_path_of_the_report():
    class Long(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return torch.log(self.layer(batch).relu() * 0).mean()

    report = report_of(step_of(Long(), torch.randn(3, 4)))
    report["notes"] = [f"note {number}" for number in range(30)]
    lines = as_text(report).splitlines()
    assert len(lines) <= 19
    assert lines[1].startswith("Cause: undefined_operation (confidence 0.95). `log` at ")
    assert any(line.startswith("  remedy   return torch.log((self.layer(batch).relu() * 0)") for line in lines)


def test_gradients_that_only_the_loss_scale_makes_too_large_are_no_failure_of_a_trial():
    class Plain(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.layer(batch).float().mean() * 100

    batch = torch.randn(8, 4)
    batch[5] = 6e5
    step = step_of(Plain(), batch, precision="16-mixed", loss_scale=65536.0)
    first = investigate(step).causes[0]
    assert (first.cause, first.samples) == ("extreme_sample", [5])


def masked_mean(out: Tensor, batch: Tensor) -> Tensor:
    mask = (batch[:, 0] > 9).float()
    return (out.sum(dim=1) * mask).sum() / mask.sum()


def counted_mean(out: Tensor, batch: Tensor) -> Tensor:
    mask = batch[:, 0] > 9
    return (out.sum(dim=1) * mask).sum() / mask.sum()


def direction(out: Tensor, batch: Tensor) -> Tensor:
    return (0 * out / (0 * out).norm(dim=1, keepdim=True)).sum()


def corrected(out: Tensor, batch: Tensor) -> Tensor:
    return (out * 0 / (1 - torch.ones(()) ** 3)).sum()


@pytest.mark.parametrize(
    ("loss", "cause"),
    [
        (masked_mean, "empty_reduction"),
        (counted_mean, "empty_reduction"),
        (direction, "undefined_operation"),
        (corrected, "undefined_operation"),
    ],
)
def test_zero_by_zero_is_a_mean_over_nothing_only_of_sums(loss, cause):
    [first, *_] = investigate(step_of(Net(loss), torch.randn(5, 4))).causes
    assert first.cause == cause


class Hooked(Net):
    """A hook spoils a weight before or in the step."""

    def __init__(self, hook: Any, before: bool) -> None:
        super().__init__(lambda out, batch: out.pow(2).mean())
        self.hook, self.before = hook, before

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if self.before:
            self.hook(self.layer)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if not self.before:
            self.hook(self.layer)
        return super().training_step(batch, batch_idx)


def divide_in_place(layer: nn.Linear) -> None:
    layer.weight.data.div_(torch.zeros(()))


def replace_by_a_quotient(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data / (0 * layer.weight.data.norm())


def write_nan(layer: nn.Linear) -> None:
    layer.weight.data[1, 2] = float("nan")


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("hook", [divide_in_place, replace_by_a_quotient, write_nan])
def test_a_hook_that_spoils_a_weight_is_named_with_the_weight(hook, before):
    found = investigate(step_of(Hooked(hook, before), torch.randn(5, 4)))
    first, origin = found.causes[0], found.origin
    assert (first.cause, first.tensor) == ("nonfinite_weights", "layer.weight")
    assert origin is not None
    assert origin.line == hook.__code__.co_firstlineno + 1
    assert "wrote what is not finite into `layer.weight`, outside of the optimizer" in first.summary


class Gain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 5e6


class Loud(Net):
    """A module in its middle multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.head = Gain(), nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.head(self.gain(self.layer(batch))).mean()


def test_a_module_whose_product_leaves_the_format_is_named_with_its_factor():
    step = step_of(Loud(), torch.randn(5, 4), precision="16-mixed", loss_scale=1.0)
    [first, *_] = investigate(step).causes
    assert (first.cause, first.module, first.facts["factor"]) == ("input_scale", "gain", 5e6)


def nothing_selected(out: Tensor, batch: Tensor) -> Tensor:
    selected = batch[:, 0] > 9
    return nn.functional.huber_loss(out[selected], out.detach()[selected])


def spread_of_nothing(out: Tensor, batch: Tensor) -> Tensor:
    return out[batch[:, 0] > 9].var()


@pytest.mark.parametrize("loss", [nothing_selected, spread_of_nothing])
def test_any_reduction_of_an_empty_selection_is_over_nothing(loss):
    [first, *_] = investigate(step_of(Net(loss), torch.randn(5, 4))).causes
    assert first.cause == "empty_reduction"


class Decayed(Net):
    """A hook writes an option of the optimizer."""

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.optimizers().param_groups[0]["weight_decay"] = float("nan")


def test_an_option_that_a_hook_writes_before_each_update_is_named():
    [first, *_] = investigate(
        step_of(Decayed(lambda out, batch: out.mean()), torch.randn(5, 4), failed="weight")
    ).causes
    assert (first.cause, first.facts["option"]) == ("optimizer_update", "weight_decay")


class Wide(Net):
    """Each output is sound; a sum over many is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 8192)
        nn.init.normal_(self.layer.weight, std=2.0)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        out = self.layer(batch)
        return (out * out).sum(dim=1).mean()


def test_a_layer_with_many_outputs_is_not_absurd_for_that():
    step = step_of(Wide(), 2 + torch.randn(5, 4), precision="16-mixed", loss_scale=1.0)
    [first, *_] = investigate(step).causes
    assert first.cause == "fp16_overflow"


def spoilt_by(**options: Any) -> RecordedStep:
    """The step after an update that made one weight NaN, which had no gradient; all that is kept is of afterwards."""
    module = Net(lambda out, batch: out[:, 0].mean())
    step = step_of(module, torch.randn(5, 4), trainer={"global_step": 1})
    optimizer = step.optimizers[0]
    for group in optimizer.param_groups:
        group.update(options)
    module.training_step(step.batches[0], 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    return step


@pytest.mark.parametrize("is_kept", [True, False])
def test_weights_that_the_update_before_spoilt_are_the_optimizers_fault(is_kept):
    step = spoilt_by(eps=0.0)
    if is_kept:
        step.state = capture_state(step.module, step.optimizers)
    [first, *_] = investigate(step).causes
    assert (first.cause, first.tensor, first.facts["option"]) == ("optimizer_update", "layer.weight", "eps")


def test_weights_that_something_else_spoilt_are_not_the_optimizers_fault():
    step = spoilt_by()
    with torch.no_grad():
        step.module.layer.weight[1, 2] = float("nan")
    [first, *_] = investigate(step).causes
    assert (first.cause, first.tensor) == ("nonfinite_weights", "layer.weight")


def test_absurd_weights_after_the_first_step_have_diverged_if_nothing_else_is_known():
    module = Net(lambda out, batch: out.pow(2).mean())
    with torch.no_grad():
        module.layer.weight.fill_(1e25)
    first, late = (step_of(module, torch.randn(5, 4), trainer={"global_step": n}) for n in (0, 7))
    assert investigate(first).causes[0].cause == "extreme_weights"
    assert investigate(late).causes[0].cause == "divergence"


def test_a_number_of_the_code_that_is_not_finite_is_named():
    batch = torch.ones(4, 4)
    step = step_of(Net(lambda out, batch: out.square().mean() * float("nan")), batch)
    [first, *_] = report_of(step)["causes"]
    assert first["cause"] == "undefined_operation"
    assert first["summary"].endswith("is given the number nan by the code")
