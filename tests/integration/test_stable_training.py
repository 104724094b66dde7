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
from typing import Any, NamedTuple

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_stability.checkpointing.writing import is_part
from lightning_stability.events import read_events
from lightning_stability.status import Run, look
from lightning_stability.status.run import NoRunError, find_run
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
    """Everything of a run's end that shall not depend on how often it was killed."""
    newest = max(root.glob("lightning_logs/version_*"), key=lambda folder: int(folder.name.split("_")[1]))
    checkpoint = torch.load(newest / "checkpoints" / "last.ckpt", weights_only=True)
    [stopping] = [state for name, state in checkpoint["callbacks"].items() if name.startswith("EarlyStopping")]
    return {
        **{f"weight {name}": value for name, value in checkpoint["state_dict"].items()},
        **{f"optimizer {name}": value for name, value in flat(checkpoint["optimizer_states"])},
        **{f"metric {name}": value for name, value in flat(checkpoint["lightning_stability"]["metrics"])},
        **{f"stopping {name}": value for name, value in stopping.items()},
        **{f"scheduler {name}": value for name, value in flat(checkpoint["lr_schedulers"])},
        "step": checkpoint["global_step"],
        "precision": [s["fallen_from"] for n, s in checkpoint["callbacks"].items() if n.startswith("PrecisionFall")],
        **last_logged(newest, "val_auroc", "val_loss"),
    }


def last_logged(folder: Path, *tags: str) -> dict[str, tuple[int, float]]:
    """The newest value of each tag in a run's TensorBoard files, and its step."""
    files = EventAccumulator(str(folder)).Reload()
    return {tag: ((last := files.Scalars(tag)[-1]).step, last.value) for tag in tags}


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """What two states do not share, a line each: for tensors how many values differ, and by how much."""
    lines = [f"{name}: only in the first" for name in first.keys() - second.keys()]
    lines += [f"{name}: only in the second" for name in second.keys() - first.keys()]
    for name in first.keys() & second.keys():
        one, other = first[name], second[name]
        if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
            if type(one) is not type(other) or one != other:
                lines.append(f"{name}: {one} and {other}")
        elif one.shape != other.shape or one.dtype != other.dtype:
            lines.append(f"{name}: {one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}")
        elif not torch.equal(one, other):
            gap = (one.double() - other.double()).abs()
            lines.append(
                f"{name}: {int((one != other).sum())} of {one.numel()} values differ, by up to {gap.max():.3g}; the"
                f" largest is {one.double().abs().max():.3g}"
            )
    return sorted(lines)


def test_a_difference_of_two_ends_is_told_with_its_size() -> None:
    ones = torch.ones(2, 3)
    other = ones.clone()
    other[0, 1] = 1.5
    first = {"same": ones, "weight": ones, "dtype": ones, "step": 3, "flag": 1, "auroc": (90, 0.5), "gone": 0}
    second = {
        "same": ones.clone(),
        "weight": other,
        "dtype": ones.double(),
        "step": 4,
        "flag": True,
        "auroc": (90, 0.75),
    }
    assert differences(first, {**second, "new": 0}) == [
        "auroc: (90, 0.5) and (90, 0.75)",
        "dtype: torch.float32 (2, 3) and torch.float64 (2, 3)",
        "flag: 1 and True",
        "gone: only in the first",
        "new: only in the second",
        "step: 3 and 4",
        "weight: 1 of 6 values differ, by up to 0.5; the largest is 1",
    ]


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
    different = differences(final_state(tmp_path / "whole"), final_state(tmp_path / "killed"))
    assert not different, f"killed in the batches {kills} of its starts:\n" + "\n".join(different)


class Training(NamedTuple):
    """One start of a run: when it was, at which of its optimizer steps, and how far it has come."""

    began: float
    first: int
    step: int
    total: int


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

    def training(self) -> Training | None:
        """How far the newest training has come, as `lightning-stability status` knows it; None before there is one."""
        try:
            run = Run(find_run(self.folder / "run"))
        except NoRunError:
            return None
        step = look(run).step
        if run.started is None or step is None:
            return None
        return Training(run.started["time"], run.started["step"], step, run.started["total_steps"])

    def log(self) -> str:
        """The end of what the training has said."""
        return (self.folder / "run" / "training.log").read_text()[-3000:]

    def close(self) -> None:
        self.run("tmux", "kill-server")

    def __enter__(self) -> Tmux:
        self.folder.mkdir()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@pytest.fixture
def socket_folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="tmux") as folder:  # a socket's path must be short
        yield folder


needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")

STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$EEGPT_RUN_DIR/words-$([[ " $* " == *" --print_config "* ]] && echo checked || echo started)"
[[ " $* " != *" --wrong "* ]] || { echo "unrecognized arguments: --wrong" >&2; exit 2; }
[[ " $* " == *" --print_config "* ]] || { echo "training, OMP_NUM_THREADS=$OMP_NUM_THREADS"; sleep 600; }
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
    tmux.run("tmux", "new-session", "-d", "-s", "other", "sleep 600")
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
        end = time.monotonic() + 300
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


class Killer:
    """Kills a run again and again, at moments that follow its own progress, so that all of them come before its end.

    Args:
        tmux: The session that it runs in.
        kills: How many there will be, spread over the length of the run.
        start_up: Seconds from the script's end to the first training step, as one start has taken them.
        seconds_per_step: Its pace.
        chance: Where the moments come from.
    """

    OVERSHOOT = 3.0
    """A kill comes up to so many steps' time after the step that it waits for: while the next is computed, validated
    or saved."""

    def __init__(self, tmux: Tmux, kills: int, start_up: float, seconds_per_step: float, chance: random.Random) -> None:
        self._tmux, self._kills, self._chance = tmux, kills, chance
        self._start_up, self._seconds_per_step = start_up, seconds_per_step
        self.story: list[str] = []

    def wait_and_kill(self) -> None:
        """The next one, after the script has started the run."""
        begun, clock = time.time(), time.monotonic()
        # a random step of this kill's part of the run; the parts end half of one before the run does
        part = (len(self.story) + self._chance.random()) / (self._kills + 0.5)
        wait = self._chance.uniform(0.0, self.OVERSHOOT) * self._seconds_per_step
        until = None
        if self._chance.random() < 0.2:  # it may die while it starts
            until = clock + self._chance.uniform(0.0, self._start_up)
        training = None
        while self._tmux.is_running():
            newest = self._tmux.training()
            if newest is not None and newest.began > begun:
                training = newest
                target = max(part * training.total, training.first)
                if until is None and training.step >= target:
                    until = time.monotonic() + wait
                if training.step >= target + self.OVERSHOOT:
                    break
            if until is not None and time.monotonic() >= until:
                break
            time.sleep(0.02)
        assert self._tmux.is_running(), "\n".join([*self.story, self._tmux.log()])
        self._tmux.kill_everything()
        where = "while it started" if training is None else f"started at {training.first}, killed at {training.step}"
        half = [path for path in (self._tmux.folder / "run").rglob("*") if is_part(path.name)]
        saving = ", while it saved" if any(path.stat().st_mtime > begun for path in half) else ""
        self.story.append(f"kill {len(self.story) + 1}: {time.monotonic() - clock:.1f} s, {where}{saving}")


@needs_tmux
@pytest.mark.slow
def test_soak_killed_ten_times_and_started_again_by_the_script_it_ends_as_if_it_had_not_been(
    tmp_path: Path, socket_folder: str
) -> None:
    made = SyntheticCorpus(train_subjects=24, eval_subjects=4, seconds=(24, 40), artefacts=2, broken=2, seed=4)
    words = [f"--data.root={made.write(tmp_path / 'corpus')}", "--data.batch_size=2", "--trainer.precision=16-mixed"]
    words += ["--trainer.log_every_n_steps=1"]  # each step can be seen from outside
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # pytest shows it when the test fails

    def start(tmux: Tmux) -> None:
        begun = tmux.script("RUN_STABLE_TRAINING.sh", *words)
        assert begun.returncode == 0, begun.stderr

    def end(tmux: Tmux) -> dict[str, Any]:
        tmux.wait()
        monitored = tmux.script("MONITOR_TRAINING.sh")
        assert monitored.returncode == 0, f"{monitored.stdout}\n{tmux.log()}"
        assert "finished: max_epochs=5 reached" in monitored.stdout, monitored.stdout
        return final_state(tmux.folder / "run")

    with Tmux(tmp_path / "whole", socket_folder) as tmux:
        start(tmux)
        begun = time.time()
        whole = end(tmux)
        training = tmux.training()
        assert training is not None
        [ended] = [e for e in read_events(find_run(tmux.folder / "run")) if e["event"] == "training_ended"]
    start_up, seconds_per_step = training.began - begun, ended["seconds"] / training.total
    print(f"{training.total} steps at {seconds_per_step:.3f} s, after {start_up:.1f} s")

    with Tmux(tmp_path / "killed", socket_folder) as tmux:
        killer = Killer(tmux, 10, start_up, seconds_per_step, random.Random(seed))
        for _ in range(10):
            start(tmux)
            killer.wait_and_kill()
            print(killer.story[-1])
        start(tmux)
        killed = end(tmux)

    assert whole["precision"] == ["16-mixed"], "it has fallen back"
    assert {name.split()[0] for name in whole} >= {
        "weight",
        "optimizer",
        "metric",
        "stopping",
        "scheduler",
        "val_auroc",
    }
    different = differences(whole, killed)
    assert not different, "\n".join([f"seed {seed}", *killer.story, *different])
