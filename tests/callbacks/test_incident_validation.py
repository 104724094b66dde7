"""A validation batch whose output is not finite is recorded, and run again in the modes that its modules were in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import SumMetric

from lightning_stability import IncidentReport, PrecisionFallback
from lightning_stability.diagnosis import diagnose
from tests import runs

pytestmark = pytest.mark.filterwarnings("ignore")


def returns(module: Any, loss: Tensor) -> Any:
    return {"loss": loss}


def logs(module: Any, loss: Tensor) -> None:
    module.log("val_loss", loss)


def updates(module: Any, loss: Tensor) -> None:
    module.total.update(loss)


def fit(one: Any, path: Path, way: Any = returns, bad: int = 1, callbacks: Any = (), **options: Any) -> Any:
    def validation_step(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        hidden = self.net[1](self.net[0](batch[0]))
        shift = 1.0 if batch_idx == bad and dataloader_idx == 0 and not self.trainer.sanity_checking else 0.0
        return way(self, torch.log(hidden.abs().amax(dim=1) * (1 - shift)).mean())  # here

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.9), nn.BatchNorm1d(4))
    module = runs.make_module(one, net, validation_step=validation_step)
    module.total = SumMetric(nan_strategy="ignore")
    report = IncidentReport(path, max_incidents=3)
    trainer = runs.trainer(one, callbacks=[report, *callbacks], max_epochs=2, limit_val_batches=4, **options)
    trainer.fit(module, runs.data(), runs.data())
    return trainer


def the_incident(path: Path) -> dict[str, Any]:
    [folder] = (path / "incidents").iterdir()
    return {"folder": folder} | json.loads((folder / "report.json").read_text())


LINE = next(n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.endswith("# here"))


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("way", [returns, logs, updates])
def test_the_first_bad_batch_of_a_validation_is_recorded(one, way, tmp_path):
    fit(one, tmp_path, way)
    report = the_incident(tmp_path)
    origin = report["origin"]
    assert (report["reproduced"], report["failed"]) == (True, "validation")
    assert (origin["phase"], origin["op"], origin["line"]) == ("forward", "log", LINE)
    about = json.loads((report["folder"] / "incident.json").read_text())
    assert (about["batch_indices"], about["details"]["epoch"], about["validation_loader"]) == ([1], 0, 0)


@pytest.mark.usefixtures("brief")
def test_an_incident_of_a_validation_is_diagnosed_offline(one, tmp_path):
    fit(one, tmp_path)
    folder = the_incident(tmp_path)["folder"]
    made = runs.make_module(one, nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.9), nn.BatchNorm1d(4)))
    made.total = SumMetric()

    def validation_step(batch: Any, batch_idx: int) -> Any:
        assert not made.net[1].training
        return torch.log(made.net[1](made.net[0](batch[0])).abs().amax() * 0)

    made.eval().validation_step = validation_step
    report = diagnose(folder, module=made)
    assert (report["reproduced"], report["origin"]["op"]) == (True, "log")


@pytest.mark.usefixtures("brief")
def test_a_run_with_an_incident_of_a_validation_goes_on_as_without(one, tmp_path):
    for metric in (logs, updates):
        runs_of_both = [fit(one, tmp_path / metric.__name__ / str(bad), metric, bad) for bad in (1, -1)]
        ours, theirs = [trainer.lightning_module.state_dict() for trainer in runs_of_both]
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
        assert not (tmp_path / metric.__name__ / "-1").exists()


def test_masks_of_minus_infinity_and_a_sanity_check_give_no_incident(one, tmp_path):
    def masked(module: Any, loss: Tensor) -> Any:
        if module.trainer.sanity_checking:
            return loss * torch.nan
        return {"loss": loss, "scores": torch.tensor([0.0, -torch.inf])}

    fit(one, tmp_path, masked, bad=-1, num_sanity_val_steps=2)
    assert not (tmp_path / "incidents").exists()


@pytest.mark.usefixtures("brief")
def test_a_validation_batch_that_fp32_cures_gives_no_incident(one, tmp_path):
    def overflows(self: Any, batch: Any, batch_idx: int) -> Any:
        return (self.net[0](batch[0]) * 1e6).mean()

    net = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.9), nn.BatchNorm1d(4))
    for callbacks, count in (([], 1), ([PrecisionFallback()], 0)):
        module = runs.make_module(one, net, validation_step=overflows)
        path = tmp_path / str(count)
        options = {"plugins": runs.fp16(one), "max_epochs": 1, "limit_val_batches": 2, "limit_train_batches": 1}
        runs.trainer(one, callbacks=[IncidentReport(path), *callbacks], **options).fit(module, runs.data(), runs.data())
        assert len(list(path.glob("incidents/*"))) == count
