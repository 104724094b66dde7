"""Diagnosing a step in the process that trains: what is found, and what is left as it was."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.data import DataLoader, Dataset

from lightning_stability.diagnosis import DiagnosisError, RecordedStep, find_origin
from lightning_stability.recovery.random_state import RandomState
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
    torch.rand(1), np.random.rand(), random.random()  # the process is not where the step ends
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
    assert find_origin(RecordedStep(module, [batch], [RandomState.capture()])).op == "log"


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
        find_origin(RecordedStep(Raises(), [torch.ones(2, 3)], [RandomState.capture()]))


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
    origin = find_origin(RecordedStep(module, [torch.ones(2, 3)], [RandomState.capture()]))
    assert (origin.phase, origin.op, origin.code) == ("forward", "mul", "return self.net(batch * torch.inf).mean()")


def test_neither_hooks_of_callbacks_nor_data_sets_are_copied():
    class Watches:
        def __init__(self):
            self.calls = 0
            self.cannot_be_copied = threading.Lock()

        def look(self, module, inputs, output):
            self.calls += 1

    class Uncopyable(Dataset):
        def __deepcopy__(self, memo):
            raise AssertionError("a copy of the data was made")

    class Net(Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 3)
            self.data = Uncopyable()

        def training_step(self, batch, batch_idx):
            return self.net(batch).log().mean()

    module, watches = Net(), Watches()
    module.net.register_forward_hook(watches.look)
    nn.init.constant_(module.net.bias, -9.0)
    assert find_origin(RecordedStep(module, [torch.rand(2, 3)], [RandomState.capture()])).op == "log"
    assert watches.calls == 0
    module.net(torch.rand(2, 3))
    assert watches.calls == 1


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_a_non_finite_update_is_found_in_every_implementation(options):
    class Dead(Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            return (self.first(batch).sum() + 0 * self.second(batch).sum()) * 1.0

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3, eps=0.0, **options)

    module = Dead()
    step = RecordedStep(module, [torch.ones(2, 2)], [RandomState.capture()], optimizers=[module.configure_optimizers()])
    origin = find_origin(step)
    assert (origin.phase, origin.module, origin.tensor) == ("optimizer", "second", "second.weight")
    assert origin.code.startswith("return torch.optim.AdamW(")


@pytest.mark.usefixtures("no_group_left")
def test_sharded_parameters_are_refused():
    module = nn.Linear(2, 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(DiagnosisError, match="sharded over several ranks"):
        find_origin(RecordedStep(module, [], []))


def test_modules_of_the_other_namespace_are_diagnosed_too():
    other = pytest.importorskip("lightning.pytorch")

    class Net(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 3)

        def training_step(self, batch, batch_idx):
            loss = self.net(batch * 0).mul(0).log().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = other.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    module = Net()
    trainer.fit(module, DataLoader(torch.rand(4, 3), batch_size=2))
    module.net.reset_parameters()
    assert find_origin(RecordedStep(module, [torch.rand(2, 3)], [RandomState.capture()])).op == "log"
    assert module.trainer is trainer
