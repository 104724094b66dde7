"""What is said of a layer's input and output is what numpy says of the same numbers in double precision."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torchmetrics import MeanMetric

from lightning_stability.health.layer_scales import LayerScales, scale_of

DTYPES = {torch.float16: (1e-3, 1e2), torch.bfloat16: (1e-18, 1e18), torch.float32: (1e-18, 1e36)}
DTYPES[torch.float64] = (1e-100, 1e200)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_all_calls_of_a_layer_together(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    low, high = (math.log10(end) for end in DTYPES[dtype])
    calls = [
        (
            10 ** data.draw(st.floats(low, high))
            * np.random.default_rng(seed).normal(data.draw(st.floats(-5, 5)), 1, size)
        )
        for seed, size in enumerate(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    ]
    tensors = [torch.tensor(values, dtype=dtype) for values in calls]
    net = nn.Sequential(nn.Identity())
    with LayerScales(net) as scales:
        for tensor in tensors:
            net(tensor)
    [layer] = scales.read()
    assert layer.input == layer.output
    assert (layer.name, layer.kind, layer.calls) == ("0", "Identity", len(tensors))
    together = torch.cat(tensors).double().numpy()
    size = np.abs(together).max()
    # (numpy's own square would overflow at 1e200)
    assert layer.input.mean == pytest.approx(together.mean(), abs=2e-6 * size)
    assert layer.input.std == pytest.approx(size * (together / size).std(), rel=1e-4, abs=1e-6 * size)
    assert (layer.input.least, layer.input.largest) == (together.min(), together.max())
    if len(tensors) == 1:
        assert scale_of(tensors[0]) == layer.input


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_seen(bad: float) -> None:
    scale = scale_of(torch.tensor([1.0, bad], dtype=torch.float16))
    assert not scale.is_finite
    assert math.isnan(scale.std)


def test_constant_values_have_std_zero() -> None:
    for value in (0.0, 0.1, -3e38, 1e-40):
        assert scale_of(torch.full((1000,), value)).std == 0.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.token = nn.ParameterList([torch.zeros(4)])
        self.encoder = Encoder()
        self.normed = parametrizations.weight_norm(nn.Linear(4, 4))
        self.unused, self.metric = nn.Linear(4, 4), MeanMetric()
        self.recurrent = nn.LSTM(4, 3)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        x = self.encoder(self.block(self.words(indices)))
        x = self.normed(self.normed(x))
        self.metric(x)
        return self.recurrent(input=x)[0]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x * self.scale)


def test_layers_are_those_that_call_no_other_in_forward_order() -> None:
    net = Net()
    with LayerScales(net) as scales:
        net(torch.randint(5, (2, 3)))
    layers = scales.read()
    names = [layer.name for layer in layers if not layer.name.startswith("block")]
    assert names == ["words", "encoder.inner", "normed", "recurrent"]
    assert "block.self_attn" in [layer.name for layer in layers]
    by_name = {layer.name: layer for layer in layers}
    assert by_name["words"].input is None  # indices
    assert by_name["words"].output is not None
    assert by_name["normed"].calls == 2
    assert by_name["recurrent"].input is not None  # given by name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_nothing_that_a_hook_would_change_is_hooked() -> None:
    net = nn.Sequential(
        torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager"),
        nn.Linear(2, 2),
        nn.Linear(2, 2),
        nn.TransformerEncoderLayer(2, 1, 2).eval(),
        torch.jit.script(nn.Linear(2, 2)),
    )
    net[2].compile(backend="eager")
    with LayerScales(net):
        assert [name for name, module in net.named_modules() if module._forward_hooks] == ["0", "1"]


def test_what_cannot_be_measured_does_not_stop_the_forward_pass() -> None:
    net = nn.Sequential(nn.Identity(), nn.Identity())
    with LayerScales(net) as scales:
        net(torch.eye(3).to_sparse())
        net(torch.zeros(0))
        net("text")
    assert [(layer.calls, layer.input) for layer in scales.read()] == [(3, None), (3, None)]
