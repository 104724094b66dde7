"""How a command on a page is run by a test: as it stands, but small.

A command that is in none of these tables fails the test that meets it, so that no snippet is forgotten. What differs
from what a reader types is here and nowhere else.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from lightning_stability.tuab import SyntheticCorpus
from tests.command import Done, Launcher
from tests.docs.blocks import ROOT, Command

VARIABLE = "LIGHTNING_STABILITY_CALLBACKS"

# Options that are added behind the others: eight steps instead of minutes.
SMALL = ("--data.batch_size=2", "--data.window_seconds=2", "--trainer.max_epochs=1", "--trainer.limit_train_batches=8")
ADDED = {
    "fit": (*SMALL, "--trainer.limit_val_batches=2", "--trainer.num_sanity_val_steps=0"),
    "demo": (*SMALL, "--trainer.limit_val_batches=2", "--trainer.limit_test_batches=2"),
    "test": ("--data.batch_size=2", "--trainer.limit_test_batches=2"),
    "predict": ("--data.batch_size=2", "--trainer.limit_predict_batches=2"),
}
# What nobody has here, and what stands for it: a small corpus and a small encoder, in files of the same form.
REPLACED = {
    "--data.root=/data/tuab": ("--data.root=tuab_synthetic",),
    "--model.checkpoint=eegpt_mcae_58chs_4s_large4E.ckpt": ("--model.checkpoint=eegpt.ckpt", "--model.encoder=small"),
}
# Lines that are not run, and why.
NOT_RUN = {
    "git clone --depth 1 --branch 2.6.6 https://github.com/Lightning-AI/pytorch-lightning": "needs the network",
    ".venv/bin/python -m tests.lightning_suite pytorch-lightning/tests": "needs what that line fetches",
}
# Not run either, but their output is shown: that of a run that goes on meanwhile. A test looks at it.
SHOWN = {
    "lightning-stability status lightning_logs/version_0": "tests/docs/test_pages.py",
}


@dataclass
class Desk:
    """A folder in which the commands of one block are run, one after the other.

    Attributes:
        folder: Where; it has `tuab_synthetic`, as after a first run, and `eegpt.ckpt`.
        launcher: Runs `lightning-stability`.
        as_typed: Nothing is added or replaced.
        env: What `export` has set. The automatic callbacks are on, as they are for a reader.
    """

    folder: Path
    launcher: Launcher
    as_typed: bool = False
    env: dict[str, str | None] = field(default_factory=lambda: {VARIABLE: None})

    def run(self, command: Command) -> Done | None:
        """Run a command; None if it is one that is looked at only."""
        if str(command) in SHOWN or str(command) in NOT_RUN or " ".join(command.words) in NOT_RUN:
            return None
        for program, how in PROGRAMS.items():
            if command.words[: len(program.split())] == program.split():
                return how(self, command.words[len(program.split()) :])
        raise AssertionError(f"Nobody has said how `{command}` is run: add it to {Path(__file__).relative_to(ROOT)}.")


def _stability(desk: Desk, words: list[str]) -> Done:
    if desk.as_typed:
        return desk.launcher(*words, cwd=desk.folder, env=desk.env)
    if words[0] == "synthetic":
        return _small_corpus(desk, words)
    small = [new for word in words for new in REPLACED.get(word, (word,))]
    return desk.launcher(*small, *ADDED.get(words[0], ()), cwd=desk.folder, env=desk.env)


def _small_corpus(desk: Desk, words: list[str]) -> Done:
    folder, *options = words[1:]
    given = {name.removeprefix("--"): int(value) for name, value in zip(options[::2], options[1::2], strict=True)}
    SyntheticCorpus(train_subjects=12, eval_subjects=4, seconds=(16, 20), **given).write(desk.folder / folder)
    return Done(words, 0, f"Wrote {folder}. Train on it with --data.root={folder}\n", "")


def _export(desk: Desk, words: list[str]) -> None:
    for word in words:
        name, equals, value = word.partition("=")
        assert equals
        assert name == VARIABLE, f"The package knows no variable {name}."
        desk.env[name] = value


def _unset(desk: Desk, words: list[str]) -> None:
    """Check its name; the variable stays, since the blocks of a walk-through run beside each other."""
    assert words == [VARIABLE]


def _make(desk: Desk, words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in words:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"The Makefile has no target {target}."


def _pip_install(desk: Desk, words: list[str]) -> None:
    """Check what is installed against the package's metadata."""
    ours = metadata.metadata("lightning-stability")
    for word in words:
        what = re.fullmatch(r"(\.|lightning-stability)(?:\[([\w,]+)\])?", word)
        assert what, f"`pip install {word}` installs something else than this package."
        extras = set(what[2].split(",")) if what[2] else set()
        assert extras <= set(ours.get_all("Provides-Extra") or []), f"{word} names an extra that there is not."


def _pytest(desk: Desk, words: list[str]) -> None:
    """Check that the tests are there."""
    [path, *options] = words
    assert (ROOT / path).is_file(), f"There are no tests {path}."
    for option, value in itertools.pairwise(options):
        assert option == "-k"
        assert value in (ROOT / path).read_text(), f"No test of {path} is called {value}."


def text_of(script: Path) -> str:
    """A script, with the modules beside it that it imports: options may be made there."""
    text = script.read_text()
    beside = re.findall(r"^from (common\.\w+) import", text, re.MULTILINE)
    return text + "".join((script.parent / f"{name.replace('.', '/')}.py").read_text() for name in beside)


def _python(desk: Desk, words: list[str]) -> Done | None:
    """Run a file of the page; check that a script of the repository is there and takes these options.

    Benchmarks are run by `make bench`.
    """
    if (desk.folder / words[0]).is_file():
        return desk.launcher(*words, cwd=desk.folder, env=desk.env)
    script = ROOT / words[0]
    assert script.is_file(), f"There is no script {words[0]}."
    for word in words[1:]:
        option = word.partition("=")[0]
        if option.startswith("--"):
            assert f'"{option}"' in text_of(script), f"{words[0]} takes no option {option}."
    return None


def _tensorboard(desk: Desk, words: list[str]) -> None:
    assert (Path(sys.executable).parent / "tensorboard").is_file()
    [folder] = [value for option, value in itertools.pairwise(words) if option == "--logdir"]
    assert list((desk.folder / folder).rglob("events.out.*")), f"There are no logs in {folder} after these commands."


def _script(desk: Desk, words: list[str]) -> None:
    """Check that its options are those of `fit`; the script itself is run by tests/integration."""
    small = [new for word in words for new in REPLACED.get(word, (word,))]
    done = desk.launcher("fit", "--config", "tuab_stable", *small, "--print_config", cwd=desk.folder, env=desk.env)
    assert done.returncode == 0, done.stderr


def _torchrun(desk: Desk, words: list[str]) -> Done:
    """Run the script in two processes with the variables that torchrun sets on two machines.

    `test_howto.py` starts torchrun itself.
    """
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(words)
    assert (given.nnodes, given.nproc_per_node) == ("2", "8")
    script = [given.training_script, *given.training_script_args]
    ranks = desk.launcher.ranks(*script, cwd=desk.folder, nodes=2, env={**desk.env, "CUDA_VISIBLE_DEVICES": ""})
    said = [f"{rank.stderr}\n{rank.stdout}" for rank in ranks]
    return Done(words, max(abs(rank.returncode) for rank in ranks), "\n".join(said), "")


def _sbatch(desk: Desk, words: list[str]) -> None:
    """Check that bash can read the script, and train; `test_howto.py` runs it."""
    [name] = words
    done = subprocess.run(["bash", "-n", name], cwd=desk.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    trained = desk.launcher("train.py", cwd=desk.folder, env=desk.env)  # so that there is something to look at
    assert trained.returncode == 0, trained.stderr


PROGRAMS: dict[str, Callable[[Desk, list[str]], Done | None]] = {
    "lightning-stability": _stability,
    "lightning": _stability,
    "python -m lightning_stability": _stability,
    "export": _export,
    "unset": _unset,
    "make": _make,
    "pip install": _pip_install,
    ".venv/bin/python -m pytest": _pytest,
    "python": _python,
    "torchrun": _torchrun,
    "sbatch": _sbatch,
    "tensorboard": _tensorboard,
    "experiments/eegpt_linear_probe/RUN_STABLE_TRAINING.sh": _script,
}
