"""CONTRIBUTING.md's layout of the package, and the path of a loss through it, are those of the code."""

from __future__ import annotations

import ast
import re

from tests.docs.blocks import ROOT
from tests.docs.test_pages import names, rows, section
from tests.test_package import MAY_IMPORT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
PACKAGE = ROOT / "lightning_stability"


def functions(path: str) -> set[str]:
    """The functions and methods of a file, as `name` and `Class.name`."""
    found = set()
    for node in ast.parse((PACKAGE / path).read_text()).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{child.name}" for child in node.body if isinstance(child, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
    return found


def test_the_layout_has_every_part_with_what_it_may_import():
    table = list(rows(section(TEXT, "Package layout and import rules")))[1:]
    shown = {names(cells[0])[0]: set(names(cells[2])) for cells in table}
    assert shown == {part or "__init__": {name or "__init__" for name in may} for part, may in MAY_IMPORT.items()}


def test_the_path_of_a_loss_is_at_most_six_functions_in_five_files_that_exist():
    table = list(rows(section(TEXT, "Where a step's data goes")))[1:]
    path = [tuple(names(cells[0])) for cells in table]
    assert len(path) <= 6
    assert len({file for file, _ in path}) <= 5
    for file, function in path:
        assert function in functions(f"runtime/{file}"), function
    for function, file in re.findall(r"`(\w[\w.]+)` in `([\w/]+\.py)`", section(TEXT, "Where a step's data goes")):
        known = functions(file if (PACKAGE / file).exists() else f"runtime/{file}")
        assert function in known, function


def test_the_path_is_the_one_that_a_step_takes(tmp_path, monkeypatch):
    """In this order, in a real run with one batch."""
    import importlib

    import torch
    from pytorch_lightning import Trainer

    from lightning_stability import NaNEarlyStop
    from tests.docs.prelude import Data, Model

    went: list[str] = []
    expected = [names(cells[0]) for cells in list(rows(section(TEXT, "Where a step's data goes")))[1:]]

    def note(owner: type, name: str, called: str) -> None:
        original = getattr(owner, name)

        def method(*args, **kwargs):
            went.append(called)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, method)

    for file, called in expected:
        owner, name = called.split(".")
        module = importlib.import_module(f"lightning_stability.runtime.{file.removesuffix('.py')}")
        note(getattr(module, owner), name, called)
    torch.manual_seed(0)
    options = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(
        max_steps=1,
        limit_val_batches=0,
        accelerator="cpu",
        enable_checkpointing=False,
        callbacks=[NaNEarlyStop()],
        default_root_dir=tmp_path,
        **options,
    )
    trainer.fit(Model(), Data())
    # (the optimizer's call surrounds the closure, which runs the passes and has the gradients measured)
    inner = [called for called in went if called != "GuardedStep._before"]
    assert inner == [called for _, called in expected if called != "GuardedStep._before"]
    assert went.count("GuardedStep._before") == 1
