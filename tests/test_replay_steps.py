"""`lightning-stability checkpoints --replay`: the steps after a save once more."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_stability._compat import MisconfigurationException
from lightning_stability.commands import show_checkpoints
from tests.callbacks.test_fractional_checkpoint import fit, saved
from tests.callbacks.test_resume_proof import OPTIONS, edited, forget_optimizer
from tests.command import Launcher
from tests.test_cli_checkpoints import OWN_CLASSES, WORDS


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_steps_are_trained_again_as_recorded_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fit(tmp_path, **OPTIONS)
    before = contents(tmp_path)
    words = ["checkpoints", str(tmp_path / "checkpoints"), "--replay", "2", "--module", "tests.replayed:run"]
    assert show_checkpoints(words) == 0
    said = capsys.readouterr().out
    # the end of fit is the newest, and nothing was recorded after it
    assert "epoch=001.57-step=000011.ckpt" in said
    assert "with the run   the same: 2 of 2 steps bitwise identical" in said
    assert "both times     the same: 2 of 2 steps bitwise identical" in said
    assert contents(tmp_path) == before
    assert not (tmp_path / "lightning_logs").exists()


def test_a_replay_names_what_differs_from_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, **OPTIONS)
    path = edited(saved(tmp_path)[0], forget_optimizer)
    assert show_checkpoints(["checkpoints", str(path), "--replay", "3", "--module", "tests.replayed:run"]) == 1
    said = capsys.readouterr().out
    assert "with the run   other optimizer state" in said
    assert "both times     the same: 3 of 3" in said


def test_two_replays_that_differ_are_told_from_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, **OPTIONS)
    words = ["checkpoints", str(saved(tmp_path)[0]), "--replay", "3", "--module", "tests.replayed:noisy"]
    assert show_checkpoints(words) == 1
    both = capsys.readouterr().out.splitlines()[-1]
    assert both.startswith("both times     other numerics")
    assert "not deterministic, a faulty device" in both


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--replay", "0"], "1 or more"),
        (["--replay", "2"], "no config.yaml"),
        (["--replay", "2", "--module", "tests.replayed:nothing"], "found a int; expected"),
        (["--replay", "2", "--module", "tests.replayed:absent"], "cannot be imported"),
    ],
)
def test_what_cannot_be_replayed_is_refused_with_one_error(tmp_path: Path, words: list[str], said: str) -> None:
    fit(tmp_path, **{**OPTIONS, "max_epochs": 1})
    with pytest.raises(MisconfigurationException, match=said):
        show_checkpoints(["checkpoints", str(tmp_path / "checkpoints"), *words])


def test_a_run_of_the_command_line_is_made_again_from_its_config(command: Launcher, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_CLASSES)
    begun = command(*WORDS, "--trainer.max_epochs=2", cwd=tmp_path)
    assert begun.returncode == 0, begun.stderr
    [path] = tmp_path.glob("lightning_logs/version_0/checkpoints/epoch=001.00*")
    done = command("checkpoints", str(path), "--replay=3", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "with the run   the same: 3 of 3 steps bitwise identical" in done.stdout
    assert [path.name for path in (tmp_path / "lightning_logs").iterdir()] == ["version_0"]
