"""repro.py fails as the recorded step did, in a process of its own and with torch alone; repro_mended.py passes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_stability.diagnosis.repro import write_repro
from lightning_stability.diagnosis.search import find_origin
from tests.zoo.catalogue import FAILURES
from tests.zoo.program import Module, Program, loader
from tests.zoo.recording import record
from tests.zoo.test_zoo import train

NOT_MENDED = {  # no epsilon, clamp or wider format helps: what grew, was never filled, or is a derivative by hand
    *("bootstrapped_target", "centred_rmsprop", "exploding_rnn", "free_of_charge", "learning_rate_too_large"),
    *("one_of_a_batch", "own_derivative", "padded_tokens", "too_long_transcript", "uninitialised_parameter"),
    *("wrong_dequantization", "fill_value", "relu_rnn", "unclipped_critic", "wrong_unit", "no_object"),
    "loud_convolution",
}
NOT_REPRODUCED = {  # it does not come again; an optimizer of the user's own; a NaN that `where` has thrown away
    *("flipped_bit", "cosmic_ray", "wrong_kernel", "fused_norm"),
    *("trust_ratio", "signed_root"),
}


def write(step: Any, folder: Path) -> dict[str, Any]:
    return write_repro(folder, step, find_origin(step))


def run(scripts: list[Path], elsewhere: Path) -> subprocess.CompletedProcess[str]:
    """One after the other, with nothing but torch: neither Lightning nor this package can be imported."""
    blocked = (
        "import sys; sys.modules.update(dict.fromkeys(['lightning', 'pytorch_lightning', 'lightning_stability']));"
    )
    each = "; ".join(f"runpy.run_path({str(script)!r}, run_name='__main__'); print('passed')" for script in scripts)
    command = f"{blocked} import runpy; {each}"
    return subprocess.run([sys.executable, "-c", command], cwd=elsewhere, capture_output=True, text=True, check=False)


def check(name: str, folder: Path) -> int:
    _, step = train(name, 0)
    found = write(step, folder)
    assert found["path"] == "repro.py", found
    text = (folder / "repro.py").read_text()
    assert len(text.splitlines()) == found["lines"]
    mended = [folder / "repro_mended.py"] if found["mended"] else []
    failed = run([*mended, folder / "repro.py"], Path("/"))
    assert failed.returncode == 1
    assert failed.stdout.count("passed") == len(mended)
    assert failed.stderr.strip().splitlines()[-1] == found["message"]
    assert found["message"].startswith("AssertionError: ")
    assert (found["mended"] is None) == (name in NOT_MENDED)
    json.dumps(found)
    return int(found["lines"])


def test_a_gradient_that_where_brings_back_is_reproduced(tmp_path):
    assert check("hidden_logarithm", tmp_path) < 20
    text = (tmp_path / "repro.py").read_text()
    assert "torch.where" in text
    assert "torch.tensor([[0.0]])" in text  # of 8 samples and 4 columns, the one value that is needed


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILURES)
def test_every_failure_of_the_zoo_is_reproduced_in_few_lines(name, tmp_path):
    if name in NOT_REPRODUCED:
        _, step = train(name, 0)
        assert write(step, tmp_path)["why_not"]
    else:
        assert check(name, tmp_path) < 40


class Standardize(nn.Module):
    """By the batch's own statistics: with one row left, they would fail for another reason."""

    def forward(self, table):
        return (table - table.mean(dim=0)) / table.std(dim=0)


HARMFUL = "a\nopen('harm', 'w')\n#"


class Tabular(Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({HARMFUL: Standardize()})
        self.net = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.net(self.parts[HARMFUL](batch)).mean()


def test_few_values_fail_for_the_same_reason_and_names_are_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = torch.randn(16, 4)
    table[8:, 1] = 1.0
    step, _ = record(Program(Tabular(), loader(list(table))))
    found = write(step, tmp_path)
    assert found["mended"] == "repro_mended.py", found
    lines = (tmp_path / "repro.py").read_text().splitlines()
    [given] = [line for line in lines if line.startswith("table = ")]
    assert "# [8, 1] float32, of [8, 4] in the step" in given  # the deviation of a single row would be nan as well
    assert any("harm" in line for line in lines)
    assert all(line.lstrip().startswith("#") for line in lines if "harm" in line)
    assert not (tmp_path / "harm").exists()


class Own(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:  # Lightning's runs the backward pass
            with torch.enable_grad():
                closure()
        for parameter in self.param_groups[0]["params"]:
            parameter.div_(0 * parameter.grad.abs())


class Unknown(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch).mean()

    def configure_optimizers(self):
        return Own(self.parameters(), {})


def test_where_no_script_can_be_made_the_reason_is_given(tmp_path):
    step, _ = record(Program(Unknown(), loader(list(torch.ones(8, 1)))))
    found = write(step, tmp_path)
    assert found == {"path": None, "why_not": "the optimizer Own is not one of torch's"}
    assert list(tmp_path.iterdir()) == []
