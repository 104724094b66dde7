"""Every line of docs/compatibility.md, proved by a run."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_stability import FractionalCheckpoint, GradNormMonitor, NaNEarlyStop, PrecisionFallback
from lightning_stability._compat import MisconfigurationException
from lightning_stability.checkpointing.listing import list_checkpoints
from lightning_stability.runtime import session_of
from tests import compatibility, runs
from tests.command import run_python
from tests.compatibility import WORKS, Case, cases

RUN = """
import sys
from tests import compatibility, test_compatibility
if __name__ == "__main__":
    [case] = [c for c in compatibility.cases() if (c.about, c.name) == {key!r}]
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
@pytest.mark.parametrize("case", [pytest.param(c, marks=marks(c), id=f"{c.about}: {c.name}") for c in cases()])
def test_the_page_says_what_happens(case, namespace, tmp_path):
    if case.where != "distributed":
        prove(case, namespace, str(tmp_path))
        return
    (tmp_path / "proof.py").write_text(
        RUN.format(key=(case.about, case.name), namespace=namespace, folder=str(tmp_path))
    )
    done = run_python("proof.py", cwd=tmp_path)
    assert "PROVED" in done.stdout, done.stderr


def test_the_page_is_the_one_that_the_cases_give():
    assert compatibility.PAGE.read_text() == compatibility.page(), "run `python -m tests.compatibility`"


def test_every_line_has_a_name_of_its_own():
    names = [(case.about, case.name) for case in cases()]
    assert sorted(set(names)) == sorted(names)


def prove(case: Case, namespace: str, folder: str) -> None:
    """Run the case and compare what happens with what the page says."""
    pl = runs.load_namespace(namespace)
    for part in ("callbacks", "strategies", "plugins"):
        importlib.import_module(f"{namespace}.{part}")
    if case.refused_because() is not None:
        trainer = make_trainer(pl, case, folder, make_callbacks(case))
        with pytest.raises(MisconfigurationException) as refused:
            trainer.fit(compatibility.make_module(pl, case))
        assert case.refused_because() in str(refused.value)
        assert trainer.global_step == 0
        return
    {"guards": prove_guards, "FractionalCheckpoint": prove_saves, "PrecisionFallback": prove_fallback}[case.about](
        pl, case, folder
    )


def make_callbacks(case: Case) -> list[Any]:
    """Those that the line is about."""
    if case.about == "guards":
        return [NaNEarlyStop(patience=1), GradNormMonitor()]
    if case.about == "PrecisionFallback":
        return [PrecisionFallback(**case.arguments)]
    return [FractionalCheckpoint(**{"every_n_epochs": 0.5, "save_top_k": -1, **case.arguments})]


def make_trainer(pl: Any, case: Case, folder: str, ours: list[Any]) -> Any:
    """A Trainer with the case's options, two epochs, and a logger that keeps what it is given."""
    options = case.options(pl)
    defaults = {
        "max_epochs": 2,
        "logger": runs.memory_logger(pl) if case.where != "distributed" else pl.loggers.CSVLogger(folder),
        "default_root_dir": folder,
        "accelerator": "gpu" if case.where == "gpu" else "cpu",
        "enable_checkpointing": case.about == "FractionalCheckpoint",
    }
    return runs.trainer(pl, **{**defaults, **options, "callbacks": [*options.get("callbacks", []), *ours]})


def prove_guards(pl: Any, case: Case, folder: str) -> None:
    stop, monitor = make_callbacks(case)
    trainer, module = make_trainer(pl, case, folder, [stop, monitor]), compatibility.make_module(pl, case)
    if case.answer != WORKS:
        with pytest.raises(RuntimeError, match="returned nan"):
            trainer.fit(module)
        return
    trainer.fit(module)
    assert_finite(module)
    if case.where != "distributed":  # a forked process keeps its callbacks for itself
        assert trainer.global_step > 2
        assert stop.state_dict()["skipped_bad"] == (2 if case.base == "manual" else 1)
        assert any("grad_norm" in key for _, row in trainer.logger.rows for key in row)
    elif trainer.is_global_zero:
        written = metrics_written(folder)
        assert "skipped_updates" in written
        assert "grad_norm" in written


def prove_saves(pl: Any, case: Case, folder: str) -> None:
    options = case.options(pl)
    trainer, module = make_trainer(pl, case, folder, make_callbacks(case)), compatibility.make_module(pl, case)
    if "a warning at the start" in case.answer:
        with pytest.warns(UserWarning, match="the position of a DataLoader within an epoch cannot be saved"):
            trainer.fit(module)
    else:
        trainer.fit(module)
    saved = trainer.strategy.broadcast(sorted(str(path) for path in Path(folder).rglob("epoch=*-step=*.ckpt")))
    saved = [path for path in saved if "epoch=00" in path]  # a ModelCheckpoint's have other names
    if case.answer.startswith("saves nothing"):
        assert saved == []
        return
    assert len(saved) >= 3, saved
    odd = {"accumulate_grad_batches", "max_steps", "devices"} & options.keys() or "Accumulation" in case.name
    if not odd:  # otherwise no step ends at half an epoch
        epochs = [Path(path).name.split("-")[0] for path in saved]
        assert epochs == ["epoch=000.50", "epoch=001.00", "epoch=001.50", "epoch=002.00"]
    if case.base != "fsdp2":  # there a checkpoint is a folder, of torch's own making
        assert all(
            info.complete and info.finite for path in saved for info in list_checkpoints(Path(path), verify=True)
        )
    again = compatibility.make_module(pl, case)
    callbacks = make_callbacks(case)
    callbacks[0].dirpath = f"{folder}/again"
    make_trainer(pl, case, folder, callbacks).fit(again, ckpt_path=saved["borders" in case.answer])
    whole, resumed = ({n: local(v) for n, v in m.state_dict().items()} for m in (module, again))
    rounded = "rounds the weights" in case.answer
    different = [name for name, value in whole.items() if not torch.equal(value, resumed[name])]
    assert bool(different) == rounded, different
    for name, value in whole.items():
        torch.testing.assert_close(value, resumed[name], rtol=1e-5, atol=1e-6)
    assert_finite(again)


def prove_fallback(pl: Any, case: Case, folder: str) -> None:
    class Look(pl.Callback):
        """Sees whether anything is measured at all."""

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self.runtime = session_of(trainer)

    look = Look()
    ours = make_callbacks(case)
    trainer, module = make_trainer(pl, case, folder, [*ours, look]), compatibility.make_module(pl, case)
    before = str(trainer.precision)
    trainer.fit(module)
    if case.answer.startswith("has nothing to do"):
        assert look.runtime is None
        assert str(trainer.precision) == before
        return
    assert_finite(module)
    assert str(trainer.precision) == ours[0].to
    assert before in ("16-mixed", "bf16-mixed", "16-true")
    if case.where != "distributed":  # as many steps as in fp32 without the callback
        options = {n: v for n, v in case.options(pl).items() if n not in ("plugins", "precision")}
        bare = replace(case, options=lambda pl: options)
        reference = make_trainer(pl, bare, folder, [])
        reference.fit(compatibility.make_module(pl, bare))
        assert trainer.global_step == reference.global_step
    if trainer.is_global_zero and case.where == "distributed":
        bits = metrics_written(folder)
        assert "16.0" in bits
        assert "32.0" in bits


def metrics_written(folder: str) -> str:
    """The one metrics.csv; after a fork the logger here has not heard where the training processes wrote it."""
    [path] = Path(folder).rglob("metrics.csv")
    return path.read_text()


def assert_finite(module: Any) -> None:
    assert [n for n, v in module.state_dict().items() if not torch.isfinite(local(v).float()).all()] == []


def local(value: Any) -> Any:
    """This process's part of a sharded tensor."""
    return value.to_local() if hasattr(value, "to_local") else value
