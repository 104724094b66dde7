"""The scripts that start and watch the stable recipe, and that a run which is killed again and again loses nothing."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_stability.events import FILE_NAME, read_events
from lightning_stability.tuab import SyntheticCorpus
from tests.command import ROOT, Launcher

SCRIPTS = ROOT / "experiments" / "eegpt_linear_probe"
SESSION = "eegpt_stable"
KILLER = """
import os, signal
from pytorch_lightning import Callback

class Kill(Callback):
    def __init__(self, at: int):
        self.batches, self.at = 0, at

    def on_train_batch_end(self, *args):
        self.batches += 1
        if self.batches == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def final_state(root: Path) -> dict[str, Any]:
    """Everything of a run's last checkpoint that shall not depend on how often it was killed."""
    newest = max(root.glob("lightning_logs/version_*"), key=lambda folder: int(folder.name.split("_")[1]))
    checkpoint = torch.load(newest / "checkpoints" / "last.ckpt", weights_only=True)
    [stopping] = [state for name, state in checkpoint["callbacks"].items() if name.startswith("EarlyStopping")]
    return {
        **{f"weight {name}": value for name, value in checkpoint["state_dict"].items()},
        **{f"optimizer {name}": value for name, value in flat(checkpoint["optimizer_states"])},
        **{f"metric {name}": value for name, value in checkpoint["lightning_stability"]["metrics"].items()},
        **{f"stopping {name}": value for name, value in stopping.items()},
        "schedulers": checkpoint["lr_schedulers"],
        "step": checkpoint["global_step"],
        "precision": [s["fallen_from"] for n, s in checkpoint["callbacks"].items() if n.startswith("PrecisionFall")],
    }


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(inner, f"{name}.{key}")
    else:
        yield name, value


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name, value in first.items() if not is_same(value, second[name])]


def is_same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return bool(first == second)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One broken file, and artefacts in a recording that is trained on, which fp16 does not hold."""
    small = SyntheticCorpus(train_subjects=12, eval_subjects=4, seconds=(24, 30), artefacts=1, broken=1, seed=3)
    return small.write(tmp_path_factory.mktemp("corpora") / "small")


@pytest.mark.slow  # (the soak is the same at length)
def test_killed_twice_and_gone_on_with_it_ends_as_if_it_had_not_been(
    command: Launcher, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "kill.py").write_text(KILLER)
    words = ["fit", "--config=tuab_stable", f"--data.root={corpus}", "--data.batch_size=4", "--ckpt_path=last_good"]
    words += ["--trainer.precision=16-mixed", "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1"]
    words += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    done = command(*words, "--trainer.default_root_dir=whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "The batch has been trained in 32-true" in done.stderr
    kills = sorted(random.sample(range(3, 10), 2), reverse=True)  # batches of that start, 24 in all
    for at in kills:
        kill = ("--trainer.callbacks+=kill.Kill", f"--trainer.callbacks.at={at}")
        done = command(*words, "--trainer.default_root_dir=killed", *kill, cwd=tmp_path)
        assert done.returncode == -signal.SIGKILL, done.stderr
    done = command(*words, "--trainer.default_root_dir=killed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert differences(final_state(tmp_path / "whole"), final_state(tmp_path / "killed")) == [], kills


class Tmux:
    """The scripts, with a tmux server of their own."""

    def __init__(self, folder: Path, socket_folder: str, program: Path = Path(sys.executable).parent) -> None:
        self.folder = folder
        path = os.pathsep.join([str(program), os.environ["PATH"]])
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TMUX")},
            **{"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMUX_TMPDIR": socket_folder},
            "EEGPT_RUN_DIR": str(folder / "run"),
        }

    def script(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run(str(SCRIPTS / name), *words)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=180)

    def is_running(self) -> bool:
        return self.run("tmux", "has-session", "-t", f"={SESSION}").returncode == 0

    def kill_everything(self) -> None:
        """`kill -9` of the session's process group: the shell, the training and what writes its log."""
        pane = self.run("tmux", "list-panes", "-t", f"={SESSION}", "-F", "#{pane_pid}").stdout.strip()
        if pane:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(os.getpgid(int(pane)), signal.SIGKILL)
        self.wait()

    def wait(self, seconds: float = 600.0) -> None:
        end = time.monotonic() + seconds
        while self.is_running():
            assert time.monotonic() < end, "the session does not end"
            time.sleep(0.1)

    def starts(self) -> int:
        """How often training has begun."""
        return sum(
            event["event"] == "training_started"
            for path in (self.folder / "run").rglob(FILE_NAME)
            for event in read_events(path.parent)
        )

    def close(self) -> None:
        self.run("tmux", "kill-server")


@pytest.fixture
def socket_folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="tmux") as folder:  # a socket's path must be short
        yield folder


needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")

STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$EEGPT_RUN_DIR/words-$([[ " $* " == *" --print_config "* ]] && echo checked || echo started)"
[[ " $* " != *" --wrong "* ]] || { echo "unrecognized arguments: --wrong" >&2; exit 2; }
[[ " $* " == *" --print_config "* ]] || { echo "training, OMP_NUM_THREADS=$OMP_NUM_THREADS"; sleep 60; }
"""


@needs_tmux
def test_the_script_starts_a_session_passes_options_on_and_refuses_a_second_one(
    tmp_path: Path, socket_folder: str
) -> None:
    """With a stand-in for the command, which notes its words: the script itself, and tmux, are real."""
    program = tmp_path / "bin" / "lightning-stability"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o755)
    tmux = Tmux(tmp_path, socket_folder, program.parent)
    # the stand-in of a session in a server that was started with another environment
    tmux.environment["OMP_NUM_THREADS"] = "7"
    tmux.run("tmux", "new-session", "-d", "-s", "other", "sleep 60")
    tmux.environment["OMP_NUM_THREADS"] = "3"
    try:
        refused = tmux.script("RUN_STABLE_TRAINING.sh", "--wrong")
        assert refused.returncode == 2
        assert "unrecognized arguments: --wrong" in refused.stderr
        assert not tmux.is_running()

        begun = tmux.script("RUN_STABLE_TRAINING.sh", "--data.root=a b", "--trainer.max_epochs=50")
        assert begun.returncode == 0, begun.stderr
        assert "tmux attach -t eegpt_stable" in begun.stdout
        assert "MONITOR_TRAINING.sh --watch" in begun.stdout
        assert tmux.is_running()
        log = tmp_path / "run" / "training.log"
        end = time.monotonic() + 30
        while not (log.exists() and "training, " in log.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        assert "training, OMP_NUM_THREADS=3" in log.read_text()
        words = (tmp_path / "run" / "words-started").read_text().splitlines()
        assert words[:3] == ["fit", "--config", "tuab_stable"]
        assert words[-3:] == ["--ckpt_path=last_good", "--data.root=a b", "--trainer.max_epochs=50"]

        again = tmux.script("RUN_STABLE_TRAINING.sh")
        assert again.returncode == 2
        assert "the session eegpt_stable is running already" in again.stderr
    finally:
        tmux.close()


@pytest.mark.parametrize(
    ("there", "script", "message"),
    [
        (["dirname", "basename"], "RUN_STABLE_TRAINING.sh", "tmux was not found"),
        (["dirname", "basename", "tmux"], "RUN_STABLE_TRAINING.sh", "lightning-stability is not installed: pip"),
        (["dirname", "basename"], "MONITOR_TRAINING.sh", "lightning-stability is not installed: pip"),
    ],
)
def test_the_scripts_say_what_is_missing(tmp_path: Path, there: list[str], script: str, message: str) -> None:
    for name in there:
        (tmp_path / name).symlink_to(shutil.which(name) or "/bin/false")
    copy = tmp_path / "scripts"  # beside which there is no .venv
    shutil.copytree(SCRIPTS, copy, ignore=shutil.ignore_patterns("eegpt_stable"))
    bash = shutil.which("bash") or "bash"
    environment = {"PATH": str(tmp_path), "TMUX_TMPDIR": str(tmp_path)}
    done = subprocess.run([bash, str(copy / script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (copy / "eegpt_stable").exists()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(["shellcheck", *map(str, SCRIPTS.glob("*.sh"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@needs_tmux
@pytest.mark.slow
def test_soak_killed_ten_times_and_started_again_by_the_script_it_ends_as_if_it_had_not_been(
    tmp_path: Path, socket_folder: str
) -> None:
    made = SyntheticCorpus(train_subjects=24, eval_subjects=4, seconds=(24, 40), artefacts=2, broken=2, seed=4)
    words = [f"--data.root={made.write(tmp_path / 'corpus')}", "--data.batch_size=2", "--trainer.precision=16-mixed"]
    words += ["--trainer.log_every_n_steps=1"]
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    print(f"seed {seed}")  # pytest shows it when the test fails
    states = {}
    for name, kills in (("whole", 0), ("killed", 10)):
        (tmp_path / name).mkdir()
        tmux = Tmux(tmp_path / name, socket_folder)
        try:
            for kill in range(kills + 1):
                begun = tmux.script("RUN_STABLE_TRAINING.sh", *words)
                assert begun.returncode == 0, begun.stderr
                if kill == kills:
                    tmux.wait()
                    break
                if chance.random() < 0.8:  # else it may die while it starts
                    before = tmux.starts()
                    while tmux.starts() == before and tmux.is_running():
                        time.sleep(0.05)
                time.sleep(chance.uniform(0.0, 4.0))
                assert tmux.is_running(), (tmp_path / name / "run" / "training.log").read_text()[-3000:]
                tmux.kill_everything()
            monitored = tmux.script("MONITOR_TRAINING.sh")
            log = (tmp_path / name / "run" / "training.log").read_text()
            assert monitored.returncode == 0, f"{monitored.stdout}\n{log[-3000:]}"
            assert "finished: max_epochs=5 reached" in monitored.stdout, monitored.stdout
        finally:
            tmux.close()
        states[name] = final_state(tmp_path / name / "run")
    assert states["whole"]["precision"] == ["16-mixed"], "it has fallen back"
    assert differences(states["whole"], states["killed"]) == []
