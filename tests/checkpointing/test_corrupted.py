"""Checkpoints that a disk, a kill or somebody else has spoilt: nothing raises, nothing hangs, none is called good."""

import copy
import os
import pickle
import random
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_stability.checkpointing import last_good_checkpoint, list_checkpoints
from lightning_stability.checkpointing.listing import table
from lightning_stability.commands import show_checkpoints
from tests import checkpoint_fit as fits

SECTION = "lightning_stability"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run wrote."""
    folder = tmp_path_factory.mktemp("run")
    fits.fit(folder, max_epochs=1, validate=False, checkpoint={"every_n_epochs": 0.5, "save_top_k": -1})
    (folder / "checkpoints" / "last.ckpt").unlink()
    return folder / "checkpoints"


def cut(content: bytearray, dice: random.Random) -> None:
    del content[dice.randrange(len(content)) :]


def flip_a_bit(content: bytearray, dice: random.Random) -> None:
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)


def flip_bytes(content: bytearray, dice: random.Random) -> None:
    for _ in range(dice.randrange(2, 40)):
        content[dice.randrange(len(content))] = dice.randrange(256)


def flip_at_the_end(content: bytearray, dice: random.Random) -> None:
    """Where the directory of the archive is."""
    content[-dice.randrange(1, 3000)] ^= 1 << dice.randrange(8)


def lose_a_block(content: bytearray, dice: random.Random) -> None:
    begin = dice.randrange(len(content))
    end = min(len(content), begin + 4096)
    content[begin:end] = bytes(end - begin)


def swap_blocks(content: bytearray, dice: random.Random) -> None:
    a, b = (512 * dice.randrange(len(content) // 512) for _ in range(2))
    content[a : a + 512], content[b : b + 512] = content[b : b + 512], content[a : a + 512]


def insert(content: bytearray, dice: random.Random) -> None:
    place = dice.randrange(len(content))
    content[place:place] = dice.randbytes(dice.randrange(1, 100))


def remove(content: bytearray, dice: random.Random) -> None:
    place = dice.randrange(len(content))
    del content[place : place + dice.randrange(1, 100)]


BYTES = (cut, flip_a_bit, flip_bytes, flip_at_the_end, lose_a_block, swap_blocks, insert, remove)


def other_type(checkpoint: dict[str, Any], dice: random.Random) -> None:
    counts = checkpoint["loops"]["fit_loop"]["epoch_progress"]["total"]
    optimizer = checkpoint["optimizer_states"][0]
    section = checkpoint[SECTION]
    names = ("saved_at", "epochs", "finite", "metrics", "ranks", "format", "nonfinite_by_design", "inside_epoch")
    fields = [
        *((checkpoint, name) for name in ("state_dict", "global_step", "epoch", "loops", "optimizer_states", SECTION)),
        *((section, name) for name in names),
        (checkpoint["state_dict"], "net.0.weight"),
        *((optimizer, name) for name in ("state", "param_groups")),
        (optimizer["param_groups"][0], "lr"),
        (counts, dice.choice(list(counts))),
    ]
    owner, name = dice.choice(fields)
    values = ["x", "1", None, [1], {1: 2}, (), 1 + 2j, torch.Size([1])]
    owner[name] = dice.choice([value for value in values if type(value) is not type(owner[name])])


def not_finite(checkpoint: dict[str, Any], dice: random.Random) -> None:
    tensors = [t for name, t in checkpoint["state_dict"].items() if t.is_floating_point() and name != "mask"]
    for state in checkpoint["optimizer_states"][0]["state"].values():
        tensors += [t for t in state.values() if isinstance(t, Tensor)]
    tensor = dice.choice(tensors)
    tensor.view(-1)[dice.randrange(tensor.numel())] = dice.choice([torch.nan, torch.inf, -torch.inf])


def bad_rate(checkpoint: dict[str, Any], dice: random.Random) -> None:
    checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] = dice.choice([torch.nan, torch.inf, -torch.inf])


STATES = (other_type, other_type, not_finite, bad_rate)


class Foreign:
    def __reduce__(self) -> Any:
        return print, ("this runs",)


def zip_file(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "x" * 1000)


FOREIGN: tuple[Callable[[Path], object], ...] = (
    os.mkfifo,
    Path.mkdir,
    Path.touch,
    zip_file,
    lambda path: path.symlink_to(path),
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to("/"),
    lambda path: path.write_text("hello"),
    lambda path: path.write_bytes(pickle.dumps(Foreign())),
    lambda path: torch.save({"state_dict": {}, "epoch": Foreign()}, path),
    lambda path: torch.save(torch.ones(3), path),
    lambda path: torch.save({"state_dict": {"w": torch.ones(3)}}, path, _use_new_zipfile_serialization=False),
)


def corruptions(good: Path, count: int) -> Iterator[Callable[[Path], object]]:
    """Each writes one file. Its name is in the message if it was called good."""
    content, checkpoint = good.read_bytes(), torch.load(good, weights_only=True)
    for seed in range(count):
        dice = random.Random(seed)
        kind = dice.choices((BYTES, STATES, FOREIGN), (0.6, 0.3, 0.1))[0]
        change = dice.choice(kind)
        if kind is BYTES:
            changed = bytearray(content)
            change(changed, dice)
            yield lambda path, changed=changed: path.write_bytes(changed)  # type: ignore[misc]
        elif kind is STATES:
            state = copy.deepcopy(checkpoint)
            change(state, dice)
            yield lambda path, state=state: torch.save(state, path)  # type: ignore[misc]
        else:
            yield change


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def hangs(*_: Any) -> None:
    raise TimeoutError("it hangs")


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_nothing_raises_or_hangs_and_nothing_spoilt_is_good(
    folder: Path, tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    older, newer = sorted(folder.glob("epoch*.ckpt"))
    original = torch.load(newer, weights_only=True)
    kept = tmp_path / older.name
    kept.write_bytes(older.read_bytes())
    harmless = 0
    signal.signal(signal.SIGALRM, hangs)
    for number, corrupt in enumerate(corruptions(newer, count)):
        path = tmp_path / "spoilt.ckpt"
        corrupt(path)
        signal.alarm(20)
        quick, verified = list_checkpoints(tmp_path), list_checkpoints(tmp_path, verify=True)
        status = show_checkpoints(["checkpoints", str(tmp_path), "--verify"])
        last_good = last_good_checkpoint(tmp_path)
        signal.alarm(0)
        assert len(table(quick).splitlines()) == len(quick) + 1 == 3, number
        [info] = [info for info in verified if info.path == path]
        assert [other.is_good for other in quick if other.path == path] == [info.is_good], number
        if info.is_good:  # a byte that nobody reads
            assert same(torch.load(path, weights_only=True), original), number
            harmless += 1
        else:
            assert (last_good, status) == (kept, 1), number
            assert info.problem, number
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with capsys.disabled():
        print(f" [{count} corrupted checkpoints, {harmless} of them in bytes that nobody reads]", end="")
    assert harmless < 0.2 * count
