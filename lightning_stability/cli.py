"""The ``lightning-stability`` command: Lightning's own command line, which trains the TUAB probe by default."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator, XLAAccelerator
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_stability.callbacks import InputError, NonFiniteError
from lightning_stability.checkpointing.listing import LAST_GOOD, find_checkpoints, newest_good, shown
from lightning_stability.commands import PROG, show_checkpoints, write_synthetic
from lightning_stability.plugin import CALLBACKS
from lightning_stability.status import leave_page, show_report, show_status
from lightning_stability.tuab.configs import config_names, packaged_file

DEFAULT_CONFIG = "demo"
_HELP = f"""
also:
  {PROG} demo [options of fit]         train, validate and test the probe on synthetic EEG, in about two minutes
  {PROG} synthetic FOLDER [options]    write a synthetic corpus of EDF files
  {PROG} checkpoints FOLDER [--verify] list checkpoints: step, epoch, size, complete, finite, metrics
  {PROG} checkpoints FOLDER --replay N train the N steps after the newest good one again, and compare
  {PROG} status FOLDER [--watch]       say how a run is doing: running or dead, step, loss, incidents, checkpoint
  {PROG} report FOLDER [FOLDER ...]    write a page about a run, or about several: curves, events, totals
  {PROG} diagnose INCIDENT             say where the first non-finite value of a recorded step was made

--ckpt_path {LAST_GOOD} resumes from the newest checkpoint that is complete and finite.

With neither --config, --model nor --data, the TUAB probe is trained as `--config {DEFAULT_CONFIG}` says.
Configurations that come with the package, by name: {", ".join(config_names())}.
Any file of settings, LightningModule and LightningDataModule works as in Lightning's own command line.
"""


_LINKED = "window_seconds"  # given to the data module, and so to the model
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

    Misconfigurations are reported in one message, without a traceback, and give the status 2; a run that
    `NaNEarlyStop(action="raise")` or `InputCheck(action="raise")` ended gives 1.

    Args:
        args: Words of the command line; those of the process by default.
    """
    words = list(sys.argv[1:] if args is None else args)
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))  # so that classes of the user's own are found, as with `python -m`
    commands: dict[str, Callable[[list[str]], object]] = {
        "demo": demo,
        "synthetic": write_synthetic,
        "checkpoints": show_checkpoints,
        "status": show_status,
        "report": show_report,
        "diagnose": _diagnose,
    }
    command = commands.get(words[0] if words else "", train)
    ours = {*commands, *StabilityCLI.subcommands()}
    if words and words[0] not in ours and not words[0].startswith("-"):
        theirs = _command_of_lightning_sdk() if args is None else None
        if theirs is not None:
            return int(theirs() or 0)
        print(f"{PROG}: error: there is no command {words[0]!r}; expected {', '.join(sorted(ours))}", file=sys.stderr)
        return 2
    try:
        status = command(words)
    except (InputError, NonFiniteError) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        message = _misconfiguration(error)
        if message is None:
            raise
        print(f"{PROG}: error: {message}", file=sys.stderr)
        return 2
    return status if isinstance(status, int) else 0


def _diagnose(words: list[str]) -> int:
    from lightning_stability.diagnosis.command import show_diagnosis

    return show_diagnosis(words)


def _command_of_lightning_sdk() -> Callable[[], Any] | None:
    """What `lightning` would be without this package, if it is under that name that we were called.

    Both packages install a command of that name, and the one that is installed last has it.
    """
    if Path(sys.argv[0]).stem != "lightning":
        return None
    found = entry_points(group="console_scripts", name="lightning")
    theirs = next((entry for entry in found if entry.module.split(".")[0] == "lightning_sdk"), None)
    return None if theirs is None else theirs.load()  # type: ignore[no-any-return]


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
    headings = [line.startswith("Problem with given class_path") for line in kept]
    pairs = zip(kept, headings, [*headings[1:], True], strict=True)
    return "\n  ".join(line for line, heads, next_heads in pairs if not (heads and next_heads))  # not one of nothing


class StabilityCLI(LightningCLI):
    """Lightning's command line, less its surprises.

    Configurations of the package are known by name, ``precision=16-mixed`` is fp16 on a CPU too, options on the command
    line go before those that a checkpoint was trained with, and ``fit`` ends by saying where things are.
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
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments(f"data.init_args.{_LINKED}", f"model.init_args.{_LINKED}")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        assert isinstance(args, list)
        words = _name_configs(_add_default_config(args))
        # not through super(): it warns whenever words are handed over while the process has some, as they always are
        self.config = parser.parse_args(words)
        options = self.config[self.config.subcommand]
        last_good = options.get("ckpt_path") == LAST_GOOD
        if last_good:
            options["ckpt_path"] = _find_last_good(options["trainer"], self.config.subcommand)
        resolved = options.get("ckpt_path")
        trained_with = _read_hyperparameters(options.get("ckpt_path"), self.config.subcommand)
        if trained_with:
            self.config = parser.parse_args(_after_configs(words, trained_with))
            if last_good:
                self.config[self.config.subcommand]["ckpt_path"] = resolved
        trainer = self.config[self.config.subcommand]["trainer"]
        trainer["callbacks"] = _one_of_each(trainer["callbacks"])
        if trainer["logger"] is False:
            # it would go to the working folder, over the user's own config.yaml or in the next run's way
            self.save_config_callback = None

    def _parse_ckpt_path(self) -> None:
        """Leave out Lightning's own way, in which a checkpoint overrides what is said on the command line."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand]["trainer"]
        if config["precision"] in ("16-mixed", 16, "16") and _is_cpu(config["accelerator"]) and not config["plugins"]:
            rank_zero_info(
                "precision=16-mixed on a CPU: real fp16 with a gradient scaler, where Lightning would use bf16."
            )
            kwargs.update(precision=None, plugins=[MixedPrecision("16-mixed", "cpu")])
        return super().instantiate_trainer(**kwargs)

    def after_instantiate_classes(self) -> None:
        if self.subcommand != "fit" and not self.config_init[self.subcommand].get("ckpt_path"):
            rank_zero_warn(f"No --ckpt_path was given: `{self.subcommand}` looks at a model that was not trained.")

    def after_fit(self) -> None:
        folder, best = self.trainer.log_dir, _best_checkpoint(self.trainer)  # on all ranks: the folder is broadcast
        if not self.trainer.is_global_zero:
            return
        logs = f"\nTensorBoard logs: {folder}" if self.trainer.loggers else ""
        checkpoint = self.trainer.checkpoint_callback
        score = getattr(checkpoint, "best_model_score", None)
        suffix = f" ({getattr(checkpoint, 'monitor', '')} {score:.3f})" if isinstance(score, torch.Tensor) else ""
        print(logs + (f"\nBest checkpoint:  {best}{suffix}" if best else ""))


def train(words: list[str]) -> None:
    """Run `fit`, `validate`, `test` or `predict`."""
    StabilityCLI(args=words)


def demo(words: list[str]) -> None:
    """Train on the synthetic corpus, test the best checkpoint, and say what came of it."""
    if _names_something(words):
        raise MisconfigurationException(f"The demo trains what it trains; use `{PROG} fit` for anything else.")
    cli = StabilityCLI(args=["fit", *words[1:]])
    trainer = cli.trainer
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    scores = trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path="best")[0]
    folder = trainer.log_dir  # asked on all ranks: it is broadcast
    if not trainer.is_global_zero:
        return
    print(
        f"\nTest AUROC: {scores['test_recording_auroc']:.3f} per recording, {scores['test_auroc']:.3f} per window\n"
        f"TensorBoard logs: {folder}\n"
        f"Best checkpoint:  {_best_checkpoint(trainer)}\n"
        "Next:\n"
        "  tensorboard --logdir lightning_logs                  look at the curves\n"
        f"  {PROG} fit --config tuab_crash         see the crash that this project answers\n"
        f"  {PROG} fit --config tuab_stable        and the recipe that trains cleanly\n"
        f"{leave_page(folder)}"
    )


def _find_last_good(trainer: Any, subcommand: str) -> str | None:
    """Return the newest complete, finite checkpoint where the configured run, or one before it, has put its own."""
    roots = [trainer.get("default_root_dir") or "."]
    given = trainer.get("callbacks") or []
    own = [str(c["init_args"]["dirpath"]) for c in given if (c.get("init_args") or {}).get("dirpath")]
    loggers = trainer.get("logger")
    given = [
        getattr(logger, "init_args", None) or {} for logger in (loggers if isinstance(loggers, list) else [loggers])
    ]
    roots += [options["save_dir"] for options in given if options.get("save_dir")]
    found = {}
    roots = list(dict.fromkeys([*map(str, roots), *own]))
    for root in roots:
        infos = [*find_checkpoints(root), *find_checkpoints(Path(root) / "lightning_logs")]
        # what lies in the root itself, other people's weights say, no callback has written unless it was told to
        found.update({info.path: info for info in infos if root in own or info.path.parent != Path(root)})
    path = newest_good(list(found.values()))
    if path is not None:
        rank_zero_info(f"The newest complete, finite checkpoint is {shown(str(path))}.")
        return str(path)
    nothing = f"--ckpt_path {LAST_GOOD}: no complete, finite checkpoint was found below {', '.join(map(str, roots))}"
    if subcommand != "fit":
        raise MisconfigurationException(f"{nothing}.")
    rank_zero_warn(f"{nothing}; training starts from the beginning.")
    return None


def _one_of_each(callbacks: Any) -> Any:
    """Of our own callbacks, of which a Trainer takes one each, keep the last: the command line's, not the recipe's."""
    if not isinstance(callbacks, list):
        return callbacks
    ours = {kind.__name__ for kind in CALLBACKS}
    names = [
        name if path.partition(".")[0] == "lightning_stability" and name in ours else None
        for path, _, name in (callback["class_path"].rpartition(".") for callback in callbacks)
    ]
    return [
        callback
        for place, (callback, name) in enumerate(zip(callbacks, names, strict=True), start=1)
        if name is None or name not in names[place:]
    ]


def _subcommand_place(words: list[str]) -> int | None:
    return next((place for place, word in enumerate(words) if word in StabilityCLI.subcommands()), None)


def _names_something(words: list[str]) -> bool:
    """Whether the words name a configuration, a model or a data module."""
    alone = ("-c", "--config", "--model", "--data")
    joined = ("--config=", "--model=", "--data=", "--model.class_path", "--data.class_path")
    return any(word in alone or word.startswith(joined) for word in words)


def _add_default_config(words: list[str]) -> list[str]:
    """Put the default configuration behind the subcommand if the words name nothing to train."""
    place = _subcommand_place(words)
    if place is None or _names_something(words) or {"-h", "--help"} & set(words):
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
        if path is not None and index < (_subcommand_place(words) or 0):
            raise MisconfigurationException(
                f"--config {value} belongs behind the subcommand: {PROG} fit --config {value}"
            )
        if path is not None:
            named[index] = f"{option}={path}" if equals else str(path)
        elif value and not Path(value).exists() and "\n" not in value:
            raise MisconfigurationException(
                f"There is no file {value}. Configurations known by name: {', '.join(config_names())}."
            )
    return named


def _read_hyperparameters(path: str | None, subcommand: str) -> list[str]:
    """Return the options that the model of a checkpoint was trained with, as words of the command line.

    A file that is no checkpoint is refused here, before anything is built; URLs, folders of sharded checkpoints and
    Lightning's own words (last, hpc, registry) pass.
    """
    if path == "best" and subcommand != "fit":
        raise MisconfigurationException("A new process knows no best checkpoint: give --ckpt_path the file.")
    if path is None or path in ("best", "last", "hpc") or str(path).startswith("registry") or "://" in str(path):
        return []
    if not Path(path).exists():
        raise MisconfigurationException(f"There is no checkpoint {path}.")
    if Path(path).is_dir() and any((Path(path) / name).exists() for name in ("meta.pt", ".metadata", "checkpoint")):
        return []
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever zip, pickle and torch stumble over
        raise MisconfigurationException(
            f"{path} cannot be loaded as a checkpoint, or it is cut short: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(content, dict) or not {"state_dict", "pytorch-lightning_version"} <= content.keys():
        raise MisconfigurationException(f"{path} is not a checkpoint of a Lightning run.")
    options = dict(content.get("hyper_parameters", {}))
    options.pop("_instantiator", None)
    model = options.pop("_class_path", None)
    if model is None:
        return []
    words = [f"--model={model}"]
    for name, value in options.items():
        text = value if isinstance(value, str) else json.dumps(value)
        words.append(f"--{'data' if name == _LINKED else 'model'}.{name}={text}")
    return words


def _after_configs(words: list[str], options: list[str]) -> list[str]:
    """Insert options where they override configurations and are overridden by the other words."""
    place = (_subcommand_place(words) or 0) + 1
    for index, word in enumerate(words):
        if word in ("-c", "--config"):
            place = max(place, index + 2)
        elif word.startswith("--config="):
            place = max(place, index + 1)
    return [*words[:place], *options, *words[place:]]


def _is_cpu(accelerator: Any) -> bool:
    if accelerator == "auto":
        return not any(a.is_available() for a in (CUDAAccelerator, MPSAccelerator, XLAAccelerator))
    return accelerator == "cpu" or isinstance(accelerator, CPUAccelerator)


def _best_checkpoint(trainer: Trainer) -> str:
    callback = trainer.checkpoint_callback
    return callback.best_model_path if isinstance(callback, ModelCheckpoint) else ""
