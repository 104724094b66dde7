"""Every line of docs/compatibility.md, proved by a run."""

import importlib
from pathlib import Path

import pytest
import torch

from lightning_stability import GradNormMonitor, NaNEarlyStop, PrecisionFallback
from lightning_stability._compat import MisconfigurationException
from tests import compatibility, runs
from tests.command import run_python
from tests.compatibility import WORKS, Case, cases

RUN = """
import sys
from tests import compatibility, test_compatibility
if __name__ == "__main__":
    [case] = [c for c in compatibility.cases() if c.name == {name!r}]
    test_compatibility.prove(case, {namespace!r}, {folder!r})
    print("PROVED")
"""


def marks(case: Case):
    return {
        "": [],
        "slow": [pytest.mark.slow],
        "distributed": [pytest.mark.slow],
        "gpu": [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
    }[case.where]


@pytest.mark.parametrize("namespace", [runs.NAMESPACES[0], pytest.param(runs.NAMESPACES[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", [pytest.param(c, marks=marks(c), id=c.name) for c in cases()])
def test_the_page_says_what_happens(case, namespace, tmp_path):
    if case.where != "distributed":
        prove(case, namespace, str(tmp_path))
        return
    (tmp_path / "proof.py").write_text(RUN.format(name=case.name, namespace=namespace, folder=str(tmp_path)))
    done = run_python("proof.py", cwd=tmp_path)
    assert "PROVED" in done.stdout, done.stderr


def test_the_page_is_the_one_that_the_cases_give():
    assert compatibility.PAGE.read_text() == compatibility.page(), "run `python -m tests.compatibility`"


def prove(case: Case, namespace: str, folder: str) -> None:
    """Run the case and compare what happens with what the page says."""
    pl = runs.load_namespace(namespace)
    for part in ("callbacks", "strategies", "plugins"):
        importlib.import_module(f"{namespace}.{part}")
    options = case.options(pl)
    logger = runs.memory_logger(pl) if case.where != "distributed" else pl.loggers.CSVLogger(folder)
    stop, monitor = NaNEarlyStop(patience=1), GradNormMonitor()
    callbacks = [*options.pop("callbacks", []), *([PrecisionFallback()] if case.fallback else [stop, monitor])]
    device = {"accelerator": "gpu" if case.where == "gpu" else "cpu"}
    trainer = runs.trainer(
        pl, **{"max_epochs": 2, "logger": logger, "default_root_dir": folder, **device, **options}, callbacks=callbacks
    )
    module = compatibility.make_module(pl, case)
    if case.answer == WORKS:
        trainer.fit(module)
        assert [n for n, v in module.state_dict().items() if not torch.isfinite(v.float()).all()] == []
        if case.fallback:
            assert trainer.precision == "32-true"
            assert trainer.global_step > 2
        elif case.where != "distributed":  # a forked process keeps its callbacks for itself
            assert trainer.global_step > 2
            assert stop._counts.skipped_bad == (2 if case.base == "manual" else 1)
            assert any("grad_norm" in key for _, row in logger.rows for key in row)
        elif trainer.is_global_zero:
            assert "skipped_updates" in (Path(logger.log_dir) / "metrics.csv").read_text()
        return
    if case.refused_because() == case.answer:
        with pytest.raises(RuntimeError, match="returned nan"):
            trainer.fit(module)
        return
    with pytest.raises(MisconfigurationException) as refused:
        trainer.fit(module)
    assert case.refused_because() in str(refused.value)
    assert trainer.global_step == 0
