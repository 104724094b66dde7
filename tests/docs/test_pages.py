"""What the pages promise about options, keys, figures and commands is what the code has."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from lightning_stability.cli import _HELP
from lightning_stability.events import EventLog
from lightning_stability.plugin import CALLBACKS
from lightning_stability.status.run import find_run
from tests.docs.blocks import ROOT, blocks_of, commands_of, pages
from tests.docs.commands import SHOWN, text_of
from tests.status.test_runs import told, train

HEADINGS = ("What it guards against", "Options", "What is logged", "What it costs", "What it refuses")
LARGEST_PICTURE = 100_000  # bytes


def page_of(cls: type) -> str:
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__.replace("NaN", "Nan")).lower()
    return (ROOT / f"docs/{name}.md").read_text()


def section(text: str, heading: str) -> str:
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[heading]


def rows(text: str) -> Iterator[list[str]]:
    """The cells of a table's rows, less its heading."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and not set(line) <= set("|-: "):
            yield cells


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


every_callback = pytest.mark.parametrize("cls", CALLBACKS, ids=lambda cls: cls.__name__)


@every_callback
def test_a_callbacks_page_has_every_section_and_a_picture(cls):
    text = page_of(cls)
    for heading in HEADINGS:
        assert section(text, heading).strip(), heading
    assert re.search(r"^!\[.{20,}\]\(\w+\.(png|svg)\)$", text, re.MULTILINE)
    for label in ("What you see", "What it costs", "When not to use it"):
        assert f"- **{label}.** " in text.partition("\n## ")[0], label


@every_callback
def test_a_callbacks_page_has_every_option_with_its_default_and_no_other(cls):
    parameters = {
        name: parameter.default
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    shown: dict[str, str] = {}
    for cells in list(rows(section(page_of(cls), "Options")))[1:]:
        shown.update(dict.fromkeys(names(cells[0]), cells[1]))
    assert shown.keys() == parameters.keys()
    for name, default in shown.items():
        if default != "as in ModelCheckpoint":
            assert default.strip("`") in (repr(parameters[name]), json.dumps(parameters[name])), name


@every_callback
def test_a_callbacks_page_and_its_docstring_have_the_same_keys(cls):
    def keys(text: str) -> set[str]:
        return {names(cells[0])[0] for cells in rows(text) if names(cells[0])}

    assert keys(section(page_of(cls), "What is logged")) == keys(inspect.cleandoc(cls.__doc__ or ""))


@every_callback
def test_the_readme_and_the_changelog_name_every_callback(cls):
    for page in ("README.md", "CHANGELOG.md", "docs/my_loss_is_nan.md", "mkdocs.yml"):
        assert cls.__name__ in (ROOT / page).read_text(), page


def test_pictures_are_small_and_shown_somewhere():
    everything = "".join((ROOT / page).read_text() for page in pages())
    for picture in (*ROOT.glob("docs/*.png"), *ROOT.glob("docs/*.svg")):
        assert picture.stat().st_size <= LARGEST_PICTURE, picture.name
        assert f"{picture.name})" in everything, picture.name


def test_commands_within_sentences_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in pages():
        text = re.sub(r"<!--.*?-->", "", (ROOT / page).read_text(), flags=re.DOTALL)
        for code in re.findall(r"`([^`\n]+)`", text):
            words = code.split()
            if words[0] == "make" and len(words) > 1:
                assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), f"{page}: {code}"
            if words[0] == "lightning-stability" and len(words) > 1:
                assert words[1] in ("fit", "validate", "test", "predict") or f" {words[1]} " in _HELP, f"{page}: {code}"
            if words[0] == "python" and words[-1].endswith(".py"):
                assert (ROOT / words[-1]).is_file(), f"{page}: {code}"


def test_the_status_of_a_run_that_goes_on_has_the_rows_that_the_page_shows(tmp_path):
    train(tmp_path)
    events = find_run(tmp_path) / "events.jsonl"
    lines = events.read_text().splitlines(keepends=True)
    events.write_text("".join(line for line in lines if "training_ended" not in line))  # as it was a moment before
    finding = {"tensor": "batch['eeg']", "reason": "scale"}
    EventLog(events.parent).write("input_flagged", 32, 1, batch_idx=15, action="warn", findings=[finding])
    report = told(tmp_path)
    assert report.state == "running"
    commands = [command for block in blocks_of("docs/status.md", "console") for command in commands_of(block)]
    [shown] = [command.shown for command in commands if str(command) in SHOWN]
    names = [name for line in shown if (name := re.split("  +", line)[0])]
    assert names == [name for name, _ in report.lines if name]


def test_every_benchmark_takes_the_option_that_make_bench_gives():
    assert [path.name for path in ROOT.glob("benchmarks/*.py") if '"--quick"' not in text_of(path)] == []


# The README's figures


def result(name: str) -> Any:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def compared(start: str) -> list[str]:
    """Both sides of a line of the README's comparison."""
    text = section((ROOT / "README.md").read_text(), "How it compares")
    [found] = [cells[1:] for cells in rows(text) if cells[0].startswith(start)]
    return found


def test_the_readme_has_at_most_120_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_readmes_counts_of_survived_faults_are_the_measured_ones():
    ours, theirs = compared("kinds of bad steps")
    survived = {
        way: sum(outcome == "yes" for outcome in outcomes.values())
        for way, outcomes in result("guard_survival")["survives"].items()
    }
    assert ours == f"{survived['NaNEarlyStop']}: `NaNEarlyStop(patience=2)`"
    others = {"SpikeDetection": 0, "EarlyStopping(check_finite=True)": 0, ".isnan() each step": 0, "stabilityguard": 1}
    assert {way: survived[way] for way in others} == others
    assert theirs.startswith("1: stabilityguard 0.3.0; 0: ")
    assert names(theirs) == ["SpikeDetection", "EarlyStopping(check_finite=True)", "loss.isnan()"]


def test_the_readmes_step_times_on_smaller_workloads_are_the_measured_ones():
    def ratios(way: str) -> str:
        medians = [w["ratio"][way]["median"] for w in result("guard_h200")["workloads"].values() if way in w["ratio"]]
        return f"{min(medians):.2f} to {max(medians):.2f}"

    ours, theirs = compared("step time, six smaller workloads")
    assert len(result("guard_h200")["workloads"]) == 6
    assert ours == f"{ratios('NaNEarlyStop')}: `NaNEarlyStop`"
    assert theirs == f"{ratios('stabilityguard')}: stabilityguard 0.3.0; {ratios('SpikeDetection')}: `SpikeDetection`"


def test_the_readmes_step_times_of_the_gpt_are_those_of_the_benchmarks_page():
    text = (ROOT / "benchmarks/README.md").read_text()
    measured = {cells[0]: cells[1] for cells in rows(text) if len(cells) == 2}
    ours, _ = compared("step time (")
    assert ours == f"{measured['`NaNEarlyStop`']}: `NaNEarlyStop`; {measured['all seven']}: all seven callbacks"


def test_the_readmes_step_times_of_batch_norms_are_the_measured_ones():
    ratio = result("overhead_batch_norms_h200")["workloads"]["batch_norms"]["ratios"]
    ours, _ = compared("step time, 53 batch norms")
    alone, all_seven = (f"{ratio[way]['median']:.2f}" for way in ("NaNEarlyStop", "all seven"))
    assert ours == f"**{alone}**: `NaNEarlyStop`; **{all_seven}**: all seven callbacks"


def test_the_readmes_figures_for_gradient_norms_are_the_measured_ones():
    ratio = result("grad_norm_h200")["workloads"]["transformer"]["steps"]["ratio"]
    ours, theirs = compared("step time with gradient norms")
    assert ours == f"{ratio['GradNormMonitor, every step']['median']:.2f}: `GradNormMonitor`"
    documented = ratio["Lightning's grad_norm"]["median"]
    assert theirs == f"{documented:.2f}: Lightning's `grad_norm`"


def test_the_readmes_figures_for_checkpoints_are_the_measured_ones():
    lost = {way: f"{seconds['median']:.3f}" for way, seconds in result("checkpoint_h100")["lost_seconds"].items()}
    ours, theirs = compared("seconds lost per save")
    assert ours == f"{lost['FractionalCheckpoint']}; {lost['FractionalCheckpoint, async_save']} with `async_save=True`"
    plain, at_once = lost["ModelCheckpoint"], lost["ModelCheckpoint, AsyncCheckpointIO"]
    assert theirs == f"{plain}: `ModelCheckpoint`; {at_once} with `AsyncCheckpointIO`"


def test_the_readmes_share_of_causes_named_right_is_that_of_the_first_looks():
    dates = ("2026-11-29", "2026-11-30", "2026-11-30_second", "2026-11-30_third")
    lots = [result(f"causes_first_look_{date}")["rows"] for date in dates]
    right = [round(100 * sum(row["cause_right"] for row in rows) / len(rows)) for rows in lots]
    assert compared("cause named right")[0] == f"{min(right)} to {max(right)} %"
    programs = {row["program"] for rows in lots for row in rows}
    assert f"{len(programs)} failures in four groups" in (ROOT / "README.md").read_text()
