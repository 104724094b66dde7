"""The commands that train nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_stability._compat import MisconfigurationException
from lightning_stability.checkpointing.consolidation import consolidate
from lightning_stability.checkpointing.listing import (
    checkpoint_folders,
    list_checkpoints,
    newest_good,
    shown,
    table,
)
from lightning_stability.checkpointing.sharded import is_sharded
from lightning_stability.checkpointing.verification import UnusableError

PROG = "lightning-stability"


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
    corpus = SyntheticCorpus(artefacts=given.artefacts, broken=given.broken, seed=given.seed)
    try:
        corpus.write(given.folder)
    except OSError as error:
        raise MisconfigurationException(f"The corpus cannot be written to {given.folder}: {error}") from error
    print(f"Wrote {given.folder}. Train on it with --data.root={given.folder}")


def show_checkpoints(words: list[str]) -> int:
    """List the checkpoints of a folder; the status is 1 if one of them cannot be used."""
    parser = argparse.ArgumentParser(
        f"{PROG} checkpoints",
        description="List the checkpoints of a folder, or of all runs below it, oldest first. The status is 1 if one"
        " is not complete or not finite.",
    )
    parser.add_argument("folder", type=Path, help="such as lightning_logs/version_0/checkpoints")
    parser.add_argument("--verify", action="store_true", help="read every byte: check sums, and that all is finite")
    parser.add_argument(
        "--replay", type=int, metavar="N", help="train the N steps after the newest good one again, twice, and compare"
    )
    parser.add_argument(
        "--consolidate", action="store_true", help="make one file of the newest good one that several ranks wrote"
    )
    parser.add_argument("--module", help="for --replay: package.module:function, which makes the module and its data")
    given = parser.parse_args(words[1:])
    if not given.folder.exists():
        raise MisconfigurationException(f"There is no folder {given.folder}.")
    if given.consolidate:
        _consolidate(given.folder)
        return 0
    if given.replay is not None:
        from lightning_stability.replay_steps import replay  # slow to import

        return replay(given.folder, given.replay, given.module)
    folders = checkpoint_folders(given.folder)
    if not folders:
        raise MisconfigurationException(f"There are no checkpoints (*.ckpt) in {given.folder} or its runs' folders.")
    good = True
    for folder in folders:
        infos = list_checkpoints(folder, given.verify)
        print(f"{shown(str(folder))}\n{table(infos)}\n")
        good = good and all(info.complete and info.finite is not False for info in infos)
    return 0 if good else 1


def _consolidate(folder: Path) -> None:
    path: Path | None = folder
    if not is_sharded(folder):
        infos = [info for below in checkpoint_folders(folder) for info in list_checkpoints(below)]
        path = newest_good([info for info in infos if is_sharded(info.path)])
    if path is None:
        raise MisconfigurationException(f"There is no good checkpoint in {folder} that several ranks wrote.")
    target = path.resolve().with_suffix(".consolidated.ckpt")
    try:
        consolidate(path, target)
    except (UnusableError, OSError) as error:
        raise MisconfigurationException(f"{path} cannot be made one file: {error}") from error
    print(f"Wrote {shown(str(target))}.")
