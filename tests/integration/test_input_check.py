"""InputCheck in the story of the crash, as a user types it."""

import csv
import re
from pathlib import Path

import pytest

from lightning_stability.events import read_events
from lightning_stability.tuab import TUABDataModule
from lightning_stability.tuab.exclusion import parse_window
from tests.command import run

WATCH = """
import sys
from pytorch_lightning import Callback

class Watch(Callback):
    def on_before_backward(self, trainer, module, loss):
        print("BACKWARD", file=sys.stderr, flush=True)
"""


def events(folder: Path, kind: str) -> list[dict]:
    return [event for event in read_events(next(folder.rglob("events.jsonl")).parent) if event["event"] == kind]


def test_the_crash_recipe_names_layer_and_factor_before_the_first_backward(cached, tmp_path, command):
    (tmp_path / "watch.py").write_text(WATCH)
    words = [*cached, "--data.batch_size=4", "--trainer.limit_val_batches=0", "--trainer.max_steps=1"]
    words += ["--data.window_seconds=2"]
    words += ["--trainer.callbacks+=InputCheck", "--trainer.callbacks+=watch.Watch"]
    done = command("fit", "--config=tuab_crash", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, *steps = done.stderr.split("BACKWARD")
    assert len(steps) == 4
    [said] = re.findall(r"InputCheck: the .*", before)
    assert "fp16 ends at 65,504" in said
    assert "the batch itself has std 1.0, so `input_stats` multiplies by 47,081" in said
    assert "It reaches `encoder.patch_embed.proj` (not finite), " in said
    assert not re.findall(r"InputCheck: the .*", "".join(steps))
    rows = {row["layer"]: row for row in csv.DictReader(next(tmp_path.rglob("input_scales.csv")).open())}
    assert float(rows["adapter"]["input_deviation"]) > 40_000
    assert rows["encoder.patch_embed.proj"]["input_deviation"] == "nan"
    [event] = events(tmp_path, "input_scales")
    assert event["far_from_unit_scale"][0]["cause"] == "input_stats"


BRIEF = ("--trainer.limit_train_batches=8", "--trainer.limit_val_batches=0")


@pytest.mark.parametrize(
    ("config", "limits"),
    [
        ("tuab_stable", BRIEF),
        pytest.param("tuab_stable", (), marks=pytest.mark.slow),
        pytest.param("demo", (), marks=pytest.mark.slow),
    ],
)
def test_the_recipes_that_train_are_silent(cached, tmp_path, command, config, limits):
    words = [*cached, "--data.batch_size=4", "--trainer.max_epochs=1", *limits]
    done = command("fit", f"--config={config}", *words, "--trainer.callbacks+=InputCheck", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "InputCheck: measured 20 layers in the first batch" in done.stderr
    assert "InputCheck: the" not in done.stderr
    assert re.search(r"InputCheck: \d+ batches looked at, 0 flagged", done.stderr)
    assert events(tmp_path, "input_scales")[0]["far_from_unit_scale"] == []


@pytest.mark.slow
def test_artefacts_are_named_by_recording_and_window_and_a_second_run_leaves_them_out(tmp_path):
    done = run("synthetic", "tuab_artefacts", "--artefacts=3", "--seed=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = ["--config=tuab_stable", "--data.root=tuab_artefacts", "--trainer.max_epochs=1"]
    words += ["--trainer.limit_val_batches=0", "--trainer.callbacks+=InputCheck", "--trainer.callbacks.action=skip"]
    first = run("fit", *words, "--trainer.default_root_dir=first", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert re.search(r"InputCheck: epoch 0, batch \d+: .* sample \d+ \(.*\.edf, window at \d+ s\)", first.stderr)
    [flagged] = tmp_path.rglob("flagged_inputs.csv")
    named = {parse_window(row["description"]) for row in csv.DictReader(flagged.open()) if row["description"]}

    # every window in which an electrode is off is named, and none besides: not those with the filter's echo of it
    module = TUABDataModule(root=str(tmp_path / "tuab_artefacts"), cache_dir=str(tmp_path / "tuab_cache"))
    module.prepare_data()
    module.setup("fit")
    train = module.datasets["train"]
    bad = {
        (module.cache.recordings[int(item["recording"])].path, int(item["start"]))
        for item in (train[index] for index in range(len(train)))
        if item["eeg"].abs().max() > 1e4
    }
    assert bad
    assert named == bad

    second = run("fit", *words, f"--data.exclude={flagged}", "--trainer.default_root_dir=second", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    recordings = len({path for path, _ in named})
    said = f"{len(named)} windows of {recordings} recordings are left out of the training set, as {flagged} says."
    assert said in second.stderr
    assert re.search(r"InputCheck: \d+ batches looked at, 0 flagged", second.stderr)
    assert len(list(tmp_path.rglob("flagged_inputs.csv"))) == 1
