"""Single numbers that left all others far behind: which are restored, and which are left."""

import copy
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_stability.recovery.odd_numbers import restore_odd_numbers


def train(net: nn.Module, optimizer: Any, steps: int, scale: float = 1.0) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (scale * (net(torch.randn(16, 8)) - 1.0).pow(2).mean()).backward()
        optimizer.step()


class Run:
    """A small net that has trained since a copy of its state was taken."""

    def __init__(self, kind: Any = torch.optim.AdamW, **options: Any) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.optimizer = kind(self.net.parameters(), lr=1e-2, **options)
        self.names = {parameter: name for name, parameter in self.net.named_parameters()}
        train(self.net, self.optimizer, 20)
        now = self.trained()
        self.kept = {
            "weights": {name: tensor.clone() for name, tensor in now["weights"].items()},
            "states": [{p: copy.deepcopy(values) for p, values in state.items()} for state in now["states"]],
        }
        train(self.net, self.optimizer, 20)

    def trained(self) -> dict[str, Any]:
        weights = {name: parameter.detach() for name, parameter in self.net.named_parameters()}
        return {"weights": weights, "states": [dict(self.optimizer.state)]}

    def restore(self) -> list[Any]:
        return restore_odd_numbers(self.trained(), self.kept, self.names)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["weight", "exp_avg"]), st.integers(0, 127), st.sampled_from([16, 32, 64]), st.sampled_from([0, 2])
)
def test_a_flipped_bit_is_undone_and_nothing_else_is_touched(what: str, place: int, power: int, layer: int) -> None:
    run = Run()
    weight = run.net[layer].weight
    before = copy.deepcopy((run.net.state_dict(), run.optimizer.state_dict()["state"]))
    target = weight.data if what == "weight" else run.optimizer.state[weight][what]
    target.view(-1)[place] = (target.view(-1)[place].abs() + 1e-3) * 2.0**power
    [odd] = run.restore()
    assert (odd.parameter, odd.what) == (f"{layer}.weight", what)
    assert odd.restored < 1.0 < odd.was
    for name, tensor in run.net.state_dict().items():
        changed = (tensor != before[0][name]).view(-1).nonzero().view(-1).tolist()
        assert changed in ([], [place] if name == f"{layer}.weight" else [])
    kept = run.kept["weights"][f"{layer}.weight"]
    assert weight.view(-1)[place] == kept.view(-1)[place]


def test_ordinary_training_is_left_as_it_is() -> None:
    for kind, options in ((torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.RMSprop, {})):
        assert Run(kind, **options).restore() == []


def test_a_training_that_went_wrong_as_a_whole_is_left_to_a_rewind() -> None:
    run = Run(torch.optim.SGD)
    with torch.no_grad():
        run.net[0].weight.mul_(2.0**20)
    before = run.net[0].weight.clone()
    assert run.restore() == []
    assert torch.equal(run.net[0].weight, before)


def test_many_large_second_moments_do_not_hide_a_flipped_weight() -> None:
    run = Run()
    with torch.no_grad():
        run.net[0].weight.view(-1)[5] = 1e9
    for parameter in run.net.parameters():
        run.optimizer.state[parameter]["exp_avg_sq"].view(-1)[:8] = 1e6
    [odd] = run.restore()
    assert (odd.what, odd.index, odd.was) == ("weight", (0, 5), 1e9)
