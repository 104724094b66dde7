"""A public name's docstring says what goes in, what it raises, and has an example that the doctests run."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import inspect
import textwrap
from typing import Any

import pytest

import lightning_stability
from lightning_stability import diagnosis, plugin, tuab
from tests.docs.blocks import ROOT

PUBLIC = [
    *(f"lightning_stability.{name}" for name in lightning_stability.__all__ if name != "__version__"),
    *(f"lightning_stability.diagnosis.{name}" for name in diagnosis.__all__),
    f"{plugin.__name__}.chosen",
    *("lightning_stability.checkpointing.last_good_checkpoint", "lightning_stability.callbacks.base.StabilityCallback"),
    *(f"lightning_stability.events.{name}" for name in ("EventLog", "Events", "read_events")),
]
BESIDE = [
    *("lightning_stability.checkpointing.CheckpointInfo", "lightning_stability.checkpointing.list_checkpoints"),
    "lightning_stability.health.StepRecord",
    *("lightning_stability.runtime.Order", "lightning_stability.runtime.Outcome"),
    *(f"lightning_stability.tuab.{name}" for name in tuab.__all__ if callable(getattr(tuab, name))),
]
"""What these hand out, and the included trainer."""


def of(name: str) -> Any:
    module, _, own = name.rpartition(".")
    return getattr(importlib.import_module(module), own)


def parameters(thing: Any) -> set[str]:
    """The names that a caller gives."""
    if inspect.isclass(thing) and "__init__" not in vars(thing):
        return set()
    found = inspect.signature(thing).parameters.values()
    return {parameter.name for parameter in found} - {"message", "events", "unreadable"}


def raises(thing: Any) -> bool:
    """Whether an exception is raised in a function's body, or in a class's constructor."""
    code = thing.__init__ if inspect.isclass(thing) else thing
    body = ast.parse(textwrap.dedent(inspect.getsource(code)))
    return any(isinstance(node, ast.Raise) for node in ast.walk(body))


def is_run(thing: Any) -> bool:
    """Whether `--doctest-modules` finds an example of it, and does not skip all of that."""
    module = importlib.import_module(thing.__module__)
    found = doctest.DocTestFinder().find(thing, thing.__qualname__, module)
    own = [test for test in found if test.name == thing.__qualname__]
    return any(not example.options.get(doctest.SKIP) for test in own for example in test.examples)


@pytest.mark.parametrize("name", PUBLIC + BESIDE)
def test_a_public_name_has_args_raises_and_an_example(name):
    thing = of(name)
    text = inspect.getdoc(thing) or ""
    sections = text.split("\n\n")
    assert sections[0].rstrip().endswith((".", ":")), "the first sentence"
    assert "Example:" in text
    assert ">>> " in text.partition("Example:")[2]
    assert is_run(thing), "the example is skipped"
    taken = "Attributes:" if "Attributes:" in text else "Args:"
    for parameter in parameters(thing):
        assert f"\n    {parameter}: " in text.partition(taken)[2], parameter
    own = inspect.isfunction(thing) or "__init__" in vars(thing)
    if own and not dataclasses.is_dataclass(thing) and raises(thing):
        assert "Raises:" in text


def test_the_public_names_are_those_of_the_api_page():
    page = {line[4:] for line in (ROOT / "docs/api.md").read_text().splitlines() if line.startswith("::: ")}
    plain = {"__version__", "CALLBACKS", "DEFAULT", "Order", "Outcome", "StepRecord"}
    assert {name for name in page if name.rpartition(".")[2] not in plain} == set(PUBLIC)
