"""Diagnosing a step in the process that trains: what is found, and what is left as it was."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_stability.checkpointing.random_state import capture_random_state
from lightning_stability.diagnosis import DiagnosisError, RecordedStep, find_origin
from tests.diagnosis import augmented
from tests.zoo.program import Module
from tests.zoo.recording import record


def state_of(module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Everything a replay could have changed, by name, as copies."""
    state = {f"{name} (weight)": parameter for name, parameter in module.named_parameters()}
    state |= {f"{name} (buffer)": buffer for name, buffer in module.named_buffers()}
    state |= {f"{name} (gradient)": p.grad for name, p in module.named_parameters() if p.grad is not None}
    for metric in (m for m in module.modules() if hasattr(m, "metric_state")):
        state |= {f"{name} (metric)": value for name, value in metric.metric_state.items()}
    for optimizer in optimizers:
        for number, values in enumerate(optimizer.state.values()):
            state |= {f"{number} {name} (optimizer)": value for name, value in values.items()}
    state["torch's random state"] = torch.get_rng_state()
    state["numpy's and Python's"] = torch.tensor([*np.random.get_state()[1], *random.getstate()[1]], dtype=torch.int64)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def test_a_diagnosis_leaves_everything_as_it_was():
    torch.manual_seed(0)
    step = record(augmented.program(0))[0]
    before, attributes = state_of(step.module, step.optimizers), set(vars(step.module))
    kinds = [set(vars(m)) for m in step.module.modules()]
    assert find_origin(step) is not None
    after = state_of(step.module, step.optimizers)
    assert [name for name in before if not torch.equal(before[name].nan_to_num(), after[name].nan_to_num())] == []
    assert before.keys() == after.keys()
    assert set(vars(step.module)) == attributes
    assert [set(vars(m)) for m in step.module.modules()] == kinds


def test_what_training_step_keeps_of_its_graph_does_not_hinder():
    class Keeps(Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 3)

        def training_step(self, batch, batch_idx):
            self.kept = self.net(batch)
            return self.kept.log().mean()

    module = Keeps()
    batch = -torch.ones(2, 3)
    module.training_step(batch, 0)
    assert find_origin(RecordedStep(module, [batch], [capture_random_state()])).op == "log"


def test_a_diagnosis_ends_when_its_time_is_up():
    step = record(augmented.program(0))[0]
    with pytest.raises(DiagnosisError, match="time given for the diagnosis was up"):
        find_origin(step, budget_seconds=0.0)


def test_a_step_that_is_finite_has_no_origin():
    step = record(augmented.program(0))[0]
    step.trainer["global_step"] = 0
    assert find_origin(step) is None


def test_code_that_raises_gives_one_error():
    class Raises(Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 3)

        def training_step(self, batch, batch_idx):
            return self.net(batch).mean() * self.trainer.datamodule.weight

    with pytest.raises(DiagnosisError, match=r"AttributeError in training_step: the module reads .*datamodule"):
        find_origin(RecordedStep(Raises(), [torch.ones(2, 3)], [capture_random_state()]))


@pytest.mark.parametrize("how", ["attribute", "in place"])
def test_a_compiled_module_is_run_eagerly(how):
    class Compiled(Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
            if how == "attribute":
                self.net = torch.compile(self.net, backend="eager")
            else:
                self.net.compile(backend="eager")

        def training_step(self, batch, batch_idx):
            return self.net(batch * torch.inf).mean()

    module = Compiled()
    module.training_step(torch.ones(2, 3), 0)
    origin = find_origin(RecordedStep(module, [torch.ones(2, 3)], [capture_random_state()]))
    assert (origin.phase, origin.op, origin.code) == ("forward", "mul", "return self.net(batch * torch.inf).mean()")
