"""One line of code each: what is made where, and which of several suspicious values is the origin."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_stability.diagnosis import Origin, RecordedStep, find_origin
from lightning_stability.recovery.random_state import RandomState
from tests.zoo.program import Module

Case = Callable[[Any, Tensor], Tensor]
CASES: list[Any] = []


class Net(Module):
    """Some layers, and a function that makes the loss of them."""

    def __init__(self, function: Case) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4, eps=0.0)
        self.batch_norm = nn.BatchNorm1d(4)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.embedding = nn.Embedding(5, 4)
        self.conv = nn.Conv1d(4, 2, 3)
        self.sparse = nn.Embedding(5, 4, sparse=True)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.function(self, batch)


def case(phase: str, op: str, module: str = "", precision: str = "32-true", failed: str = "loss") -> Any:
    def add(function: Case) -> Case:
        CASES.append(pytest.param(function, phase, op, module, precision, failed, id=function.__name__))
        return function

    return add


def origin_of(function: Case, precision: str = "32-true") -> Origin | None:
    torch.manual_seed(0)
    return find_origin(RecordedStep(Net(function), [torch.rand(3, 4)], [RandomState.capture()], precision=precision))


@case("forward", "softmax", "attention")
def torchs_own_attention_with_all_keys_masked(net, x):
    x = net.linear(x).unsqueeze(1)
    mask = torch.ones(3, 1, dtype=torch.bool)
    return net.attention(x, x, x, key_padding_mask=mask)[0].sum()  # here


@case("backward", "sqrt", failed="gradient")
def a_gradient_penalty(net, x):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((net.linear(x) * 0).pow(2).sum(), x, create_graph=True)
    return gradient.pow(2).sum(dim=1).sqrt().mean()  # here


@case("forward", "log")
def a_slice_that_is_written_in_place(net, x):
    out, hidden = torch.zeros(3, 5), net.linear(x)
    for place in range(5):
        value = hidden[:, 0].abs() + (place != 2)
        out[:, place] = value
    out[:, 3] = torch.log(hidden[:, 1] * 0)  # here
    return out[:, 1:4].mean()


@case("forward", "log")
def a_number_that_went_through_python(net, x):
    weight = torch.log(x.sum() * 0)  # here
    return net.linear(x).sum() * weight.item()


@case("forward", "nll_loss")
def a_target_that_is_masked(net, x):
    logits = net.linear(x).masked_fill(torch.tensor([True, False, False, False]), -math.inf)
    return F.cross_entropy(logits, torch.zeros(3, dtype=torch.long))  # here


@case("forward", "matmul")
def an_overflow_behind_a_mask(net, x):
    hidden = net.linear(x) * 1e20
    scores = hidden @ hidden.T  # here
    scores = scores.masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), -math.inf)
    return (scores - scores.amax(dim=-1, keepdim=True)).softmax(dim=-1).mean()


@case("forward", "mul")
def a_mask_that_is_multiplied_with_infinity(net, x):
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0])
    bias = (1 - mask) * -math.inf  # here
    return (net.linear(x) + bias).softmax(dim=-1).mean()


@case("forward", "log")
def a_checkpointed_forward_pass(net, x):
    def block(x):
        return torch.log(x * 0)  # here

    return checkpoint(block, net.linear(x), use_reentrant=False).mean()


@case("backward", "sqrt", failed="gradient")
def a_checkpointed_backward_pass(net, x):
    def block(x):
        return (x * 0).pow(2).sum(dim=1).sqrt()  # here

    return checkpoint(block, net.linear(x), use_reentrant=True).mean()


@case("forward", "batch_norm", "batch_norm", failed="buffer")
def running_statistics_that_overflow(net, x):
    return net.batch_norm(net.linear(x) * 1e25).mean()  # here


@case("forward", "layer_norm", "norm")
def a_layer_norm_without_epsilon(net, x):
    return net.norm(net.linear(x) * 0).sum()  # here


@case("forward", "mul")
def an_infinity_that_an_lstm_was_given(net, x):
    x = net.linear(x) * 1e30
    x = x * 1e30  # here
    return net.lstm(x.unsqueeze(1))[0].sum()


@case("forward", "to", "conv", "16-mixed")
def an_input_that_does_not_fit_fp16(net, x):
    return net.conv(1e5 + x[..., None].expand(3, 4, 5)).float().mean()  # here


@case("forward", "mean")
def a_mean_over_nothing(net, x):
    return net.linear(x)[:0].mean()  # here


@case("forward", "log")
def a_branch_that_is_chosen(net, x):
    hidden = net.linear(x) * 0
    discarded = hidden / hidden
    chosen = (hidden - 1).log()  # here
    return torch.where(hidden == 0, chosen, discarded).mean()


@case("forward", "log")
def a_tensor_that_is_written_over(net, x):
    out = torch.full((3, 4), math.nan)
    out.copy_((net.linear(x) * 0 - 1).log())  # here
    return out.mean()


@case("backward", "sqrt", failed="loss")
def a_derivative_by_torch_func(net, x):
    def distance(row):
        return (row * 0).pow(2).sum().sqrt()  # here

    return torch.func.grad(distance)(net.linear(x)).sum()


@case("forward", "log")
def an_operation_within_vmap(net, x):
    def of_row(row):
        return torch.log(row * 0).sum()  # here

    return torch.func.vmap(of_row)(net.linear(x)).mean()


@case("backward", "sqrt", failed="gradient")
def a_sparse_gradient(net, x):
    rows = net.sparse(torch.tensor([1, 2]))
    return (rows * 0).pow(2).sum(dim=1).sqrt().sum()  # here


@case("forward", "div")
def a_sparse_product(net, x):
    hidden = net.linear(x) / 0  # here
    return torch.sparse.mm(torch.eye(3).to_sparse(), hidden).sum()


@case("forward", "log")
def nested_sequences(net, x):
    nested = torch.nested.nested_tensor([x[:2], x[1:2]], layout=torch.jagged)
    hidden = net.linear(nested) * 0
    return hidden.log().values().mean()  # here


def line_of(function: Case) -> int:
    lines, first = inspect.getsourcelines(function)
    [offset] = [offset for offset, line in enumerate(lines) if line.endswith("# here\n")]
    return first + offset


@pytest.mark.parametrize(("function", "phase", "op", "module", "precision", "failed"), CASES)
def test_the_origin_is(function, phase, op, module, precision, failed):
    origin = origin_of(function, precision)
    assert origin is not None
    found = (origin.phase, origin.op, origin.module, origin.failed, origin.line)
    assert found == (phase, op, module, failed, line_of(function))


def test_a_weight_that_was_not_finite_before():
    def embed(net, x):
        return net.embedding(torch.tensor([1, 2])).sum()

    module = Net(embed)
    module.embedding.weight.data[2] = math.nan
    origin = find_origin(RecordedStep(module, [torch.rand(3, 4)], [RandomState.capture()]))
    assert (origin.phase, origin.tensor, origin.module) == ("weights", "embedding.weight", "embedding")


def test_a_value_that_the_forward_pass_discarded_is_told_from_a_derivative():
    def discarded(net, x):
        return torch.where(x < 2, net.linear(x), 1 / (net.linear(x) * 0)).mean()

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            return grad / 0

    by_where = origin_of(discarded)
    by_hand = origin_of(lambda net, x: Derivative.apply(net.linear(x)).mean())
    assert (by_where.phase, by_where.op, by_where.discarded) == ("backward", "reciprocal", True)
    assert (by_hand.phase, by_hand.op, by_hand.code) == ("backward", "derivative", "return grad / 0")
    assert not by_hand.discarded


@pytest.mark.parametrize(
    ("function", "phase", "tensor"),
    [
        pytest.param(lambda net, x: net.linear(x).mean(), "input", "batch", id="a feature"),
        pytest.param(lambda net, x: (net.linear.bias - x).abs().mean(), "input", "batch", id="a target"),
        pytest.param(lambda net, x: (net.linear.bias + x).softmax(dim=-1).mean(), "forward", None, id="a mask"),
    ],
)
def test_minus_infinity_in_the_batch_is_damage_unless_it_is_a_mask(function, phase, tensor):
    x = torch.rand(3, 4)
    x[1] = -math.inf
    origin = find_origin(RecordedStep(Net(function), [x], [RandomState.capture()]))
    assert (origin.phase, origin.tensor, origin.samples) == (phase, tensor, [1])


@pytest.mark.parametrize("view", [lambda x: x.T, lambda x: x[:, 2:], lambda x: x.flatten(), lambda x: x[1:]])
def test_samples_are_those_of_the_batch_whatever_view_of_it_was_read(view):
    x = torch.rand(3, 4)
    x[2, 3] = math.nan
    step = RecordedStep(Net(lambda net, x: view(x).sum() * net.linear.bias.sum()), [x], [RandomState.capture()])
    assert find_origin(step).samples == [2]


def test_the_range_of_what_went_in_is_told():
    origin = origin_of(lambda net, x: torch.log(net.linear(x) * 0 - 2).mean())
    [values] = origin.inputs
    assert (values.min, values.max, values.nonfinite) == (-2.0, -2.0, 0)
    assert origin.output.nan == 12
