"""A line of the user's code is another one for a while."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_stability.diagnosis.mending import Mend, expressions_at, functions_with, mended, span
from lightning_stability.diagnosis.mends import mends_of
from lightning_stability.diagnosis.origin import Origin
from lightning_stability.diagnosis.ranges import Range
from tests.diagnosis import mended_functions

FILE = mended_functions.__file__
SOURCE = Path(FILE).read_bytes()


def line_of(mark: str) -> int:
    [found] = [i for i, line in enumerate(SOURCE.decode().splitlines(), 1) if line.endswith(f"# {mark}")]
    return found


def mend(mark: str, old: str, new: str) -> Mend:
    line = line_of(mark)
    nodes, _ = expressions_at(SOURCE, line)
    [place] = {span(SOURCE, node) for node in nodes if SOURCE[slice(*span(SOURCE, node))].decode() == old}
    return Mend(FILE, line, *place, new)


def apply(change: Mend):
    return mended(change, functions_with(change.file, change.line))


def test_a_function_runs_the_mended_line_and_then_its_own_again():
    change = mend("plain", "x", "max(x, 1)")
    assert change.code == "return math.log(max(x, 1))  # plain"
    with apply(change):
        assert mended_functions.plain(0) == 0.0
    with pytest.raises(ValueError, match=r"domain|positive"):
        mended_functions.plain(0)


def test_a_closure_that_was_made_before_and_one_made_within_are_mended():
    before = mended_functions.outer(0)
    with apply(mend("inner", "y", "(y + 1)")):
        within = mended_functions.outer(0)
        assert (before(3), within(3)) == (3, 3)
    with pytest.raises(ZeroDivisionError):
        before(3)


def test_a_method_that_calls_super_is_mended():
    with apply(mend("super", "0", "1")):
        assert mended_functions.Derived().scale() == 2


def test_a_line_within_a_statement_of_several_is_mended():
    change = mend("long", "b", "(b or 1)")
    assert change.code == "a / (b or 1),  # long"
    with apply(change):
        assert mended_functions.long(2, 0) == 4


def test_names_that_are_not_ascii_do_not_shift_the_place():
    with apply(mend("umlaut", "0", "2")):
        assert mended_functions.ümlaut(4) == 2


def test_the_line_is_its_own_again_after_an_error():
    change = mend("plain", "x", "undefined")
    with pytest.raises(NameError), apply(change):
        mended_functions.plain(1)
    assert mended_functions.plain(1) == 0.0


def test_a_line_that_no_function_has_is_refused():
    with pytest.raises(LookupError, match="no function of this process"), apply(Mend(FILE, 3, 0, 0, "")):
        pass


@pytest.mark.parametrize(
    ("op", "code", "least", "expected"),
    [
        ("log", "torch.log(a * b)", -1.0, "torch.log((a * b).clamp(min=1e-6))"),
        ("log", "p.log().mean()", 0.0, "p.clamp(min=1e-6).log().mean()"),
        ("log", "F.log(x[0])", 0.0, "F.log(x[0].clamp(min=1e-6))"),
        ("log1p", "y.log1p()", -2.0, "y.clamp(min=-1 + 1e-6).log1p()"),
        ("div", "a / b.sum()", 0.0, "a / b.sum().clamp(min=1e-6)"),
        ("div", "a / b", -1.0, "a / (b + 1e-6)"),
        ("div", "a / (b - c)", 0.0, "a / (b - c).clamp(min=1e-6)"),
        ("div", "(a - b) / (b - c)", 0.0, "(a - b) / (b - c).clamp(min=1e-6)"),
        ("log", "(a * b).log()", 0.0, "(a * b).clamp(min=1e-6).log()"),
        ("acos", "x.acos()", -2.0, "x.clamp(-1 + 1e-6, 1 - 1e-6).acos()"),
        ("logit", "torch.logit(p)", 0.0, "torch.logit(p.clamp(1e-6, 1 - 1e-6))"),
        ("pow", "x ** self.p", -1.0, "x.clamp(min=1e-6) ** self.p"),
        ("softmax", "s.softmax(dim=-1)", 0.0, "s.clamp(min=-1e4).softmax(dim=-1)"),
        ("mean", "x[mask].mean()", 0.0, "x[mask].mean().nan_to_num()"),
        ("std", "x.std(dim=0)", 0.0, "x.std(dim=0, correction=0)"),
    ],
)
def test_an_operation_has_changes_that_can_be_pasted(op, code, least, expected, tmp_path):
    file = tmp_path / "net.py"
    file.write_text(f"import torch\nfrom torch.nn import functional as F\n\n\ndef f(x):\n    return {code}\n")
    inputs = [Range(0.0, 1.0), Range(least, 1.0)]
    origin = Origin("forward", "", op, str(file), 6, code, None, [], inputs, Range(0, 0, nan=1), None, "float32")
    assert f"return {expected}" in [change.code for change in mends_of(origin)]
