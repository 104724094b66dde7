"""The ``lightning-stability`` command: Lightning's own command line, which trains the TUAB probe by default."""

from __future__ import annotations

import argparse
import re
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator, XLAAccelerator
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from lightning_stability.tuab.configs import config_names, packaged_file

PROG = "lightning-stability"
DEFAULT_CONFIG = "demo"
_HELP = f"""
also:
  {PROG} demo [options of fit]         train, validate and test the probe on synthetic EEG, in about two minutes
  {PROG} synthetic FOLDER [options]    write a synthetic corpus of EDF files

With neither --config, --model nor --data, the TUAB probe is trained as `--config {DEFAULT_CONFIG}` says.
Configurations that come with the package, by name: {", ".join(config_names())}.
Any file of settings, LightningModule and LightningDataModule works as in Lightning's own command line.
"""


_PARSER_TALK = (
    "Does not validate against any of the Union",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    "Given value",
)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Misconfigurations are reported in one message, without a traceback, and give the status 2.

    Args:
        args: Words of the command line; those of the process by default.
    """
    words = list(sys.argv[1:] if args is None else args)
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))  # so that classes of the user's own are found, as with `python -m`
    command: Callable[[list[str]], object] = {"demo": demo, "synthetic": write_synthetic}.get(
        words[0] if words else "", lambda words: StabilityCLI(args=words)
    )
    try:
        command(words)
    except Exception as error:
        message = _misconfiguration(error)
        if message is None:
            raise
        print(f"{PROG}: error: {message}", file=sys.stderr)
        return 2
    return 0


def _misconfiguration(error: BaseException | None) -> str | None:
    """Return what the user got wrong if that is what ``error`` comes from, else None."""
    if isinstance(error, RuntimeError) and "loading state_dict" in str(error):
        return f"the checkpoint is not one of this model: {error}"
    # the parser wraps what the constructor of a model or data module raises
    while error is not None and not isinstance(error, MisconfigurationException):
        error = error.__cause__
    return None if error is None else str(error)


class _Parser(LightningArgumentParser):
    """Reports an error in its own words alone; Lightning's parser prints its 80 lines of usage before them."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a parser within the parser, whose message becomes part of another one
            super().error(message, ex)
        command = self.prog.replace(" [options]", "")
        raise MisconfigurationException(f"{_plain(message)}\nSee `{command} --help`.") from ex


def _plain(message: str) -> str:
    """Strip a message of jsonargparse of what only describes its own types and values."""
    kept: list[str] = []
    for line in message.splitlines():
        text = line.strip(" -")
        unknown = re.fullmatch(r"Expected a dot import path string: (.*)", text)
        if unknown:
            text = f"unknown class {unknown[1]}: give a path such as my_module.{unknown[1]}"
        if text and not text.startswith(_PARSER_TALK) and text not in kept:
            kept.append(text)
    return "\n  ".join(kept)


class StabilityCLI(LightningCLI):
    """Lightning's command line, less its surprises.

    Configurations of the package are known by name, ``precision=16-mixed`` is fp16 on a CPU too, and ``fit`` ends by
    saying where things are.
    """

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(
            args=list(args),
            parser_class=_Parser,
            parser_kwargs={
                "prog": PROG,
                "description": "Train with Lightning and stay stable.",
                "epilog": _HELP,
                "formatter_class": argparse.RawDescriptionHelpFormatter,
            },
            # without a logger the file goes to the working folder, where the next run would find it and refuse to start
            save_config_kwargs={"overwrite": True},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.init_args.window_seconds", "model.init_args.window_seconds")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        assert isinstance(args, list)
        # not through super(): it warns whenever words are handed over while the process has some, as they always are
        self.config = parser.parse_args(_name_configs(_add_default_config(args)))
        _check_checkpoint(self.config[self.config.subcommand].get("ckpt_path"))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand]["trainer"]
        if config["precision"] in ("16-mixed", 16, "16") and _is_cpu(config["accelerator"]) and not config["plugins"]:
            rank_zero_info(
                "precision=16-mixed on a CPU: real fp16 with a gradient scaler, where Lightning would use bf16."
            )
            kwargs.update(precision=None, plugins=[MixedPrecision("16-mixed", "cpu")])
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        _say_what_next(self.trainer)


def demo(words: list[str]) -> None:
    """Train on the synthetic corpus, test the best checkpoint, and say what came of it."""
    cli = StabilityCLI(args=["fit", *words[1:]])
    scores = cli.trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path="best")[0]
    best = _best_checkpoint(cli.trainer)
    print(
        f"\nTest AUROC: {scores['test_recording_auroc']:.3f} per recording, {scores['test_auroc']:.3f} per window\n"
        f"TensorBoard logs: {cli.trainer.log_dir}\n"
        f"Best checkpoint:  {best}\n"
        "Next:\n"
        "  tensorboard --logdir lightning_logs                  look at the curves\n"
        f"  {PROG} fit --config tuab_crash         see the crash that this project answers\n"
        f"  {PROG} fit --config tuab_stable        and the recipe that trains cleanly"
    )


def write_synthetic(words: list[str]) -> None:
    """Write a synthetic corpus."""
    from lightning_stability.tuab.synthetic import SyntheticCorpus

    parser = argparse.ArgumentParser(
        f"{PROG} synthetic",
        description="Write made-up recordings as EDF files in the layout of the TUAB corpus.",
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    parser.add_argument("--artefacts", type=int, default=0, help="recordings with bursts of 1e6 microvolts")
    parser.add_argument("--broken", type=int, default=0, help="files that are cut off in their header")
    given = parser.parse_args(words[1:])
    SyntheticCorpus(artefacts=given.artefacts, broken=given.broken, seed=given.seed).write(given.folder)
    print(f"Wrote {given.folder}. Train on it with --data.root={given.folder}")


def _add_default_config(words: list[str]) -> list[str]:
    """Put the default configuration behind the subcommand if the words name nothing to train."""
    chosen = ("-c", "--config", "--model", "--data", "--help", "-h")
    names_something = any(
        word in chosen
        or word.startswith(("--config=", "--model=", "--data=", "--model.class_path", "--data.class_path"))
        for word in words
    )
    place = next((i for i, word in enumerate(words) if word in StabilityCLI.subcommands()), None)
    if names_something or place is None:
        return words
    return [*words[: place + 1], "--config", DEFAULT_CONFIG, *words[place + 1 :]]


def _name_configs(words: list[str]) -> list[str]:
    """Replace bare names of packaged configurations by their paths."""
    named = list(words)
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option not in ("-c", "--config"):
            continue
        if not equals:
            index, value = index + 1, words[index + 1] if index + 1 < len(words) else ""
        path = packaged_file(value) if value else None
        if path is not None:
            named[index] = f"{option}={path}" if equals else str(path)
        elif value and not Path(value).exists() and "\n" not in value:
            raise MisconfigurationException(
                f"There is no file {value}. Configurations known by name: {', '.join(config_names())}."
            )
    return named


def _check_checkpoint(path: str | None) -> None:
    """Refuse a file that is none before anything is built; Lightning's own words (best, last, ...) and URLs pass."""
    if path is None or path in ("best", "last", "hpc", "registry") or "://" in str(path):
        return
    if not Path(path).exists():
        raise MisconfigurationException(f"There is no checkpoint {path}.")
    if Path(path).is_file() and not zipfile.is_zipfile(path):
        raise MisconfigurationException(f"{path} is not a checkpoint written by torch.save, or it is cut short.")


def _is_cpu(accelerator: Any) -> bool:
    if accelerator == "auto":
        return not any(a.is_available() for a in (CUDAAccelerator, MPSAccelerator, XLAAccelerator))
    return accelerator == "cpu" or isinstance(accelerator, CPUAccelerator)


def _best_checkpoint(trainer: Trainer) -> str:
    callback = trainer.checkpoint_callback
    return callback.best_model_path if isinstance(callback, ModelCheckpoint) else ""


def _say_what_next(trainer: Trainer) -> None:
    best = _best_checkpoint(trainer)
    if not best or not trainer.is_global_zero:
        return
    score = getattr(trainer.checkpoint_callback, "best_model_score", None)
    monitor = getattr(trainer.checkpoint_callback, "monitor", None)
    print(
        f"\nTensorBoard logs: {trainer.log_dir}\n"
        f"Best checkpoint:  {best}" + (f" ({monitor} {score:.3f})" if isinstance(score, torch.Tensor) else "")
    )
