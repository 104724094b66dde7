"""Checkpoints that two ranks write together with FSDP2: whole or not there, verified, put together, dealt out anew."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_stability._compat import MisconfigurationException
from lightning_stability.checkpointing import last_good_checkpoint, list_checkpoints
from lightning_stability.checkpointing.listing import CheckpointInfo
from lightning_stability.checkpointing.sharded import METADATA, REST, parts
from lightning_stability.commands import show_checkpoints
from tests import checkpoint_fit as fits
from tests.callbacks.test_fractional_checkpoint import assert_same, fit, log, result, saved

pytestmark = pytest.mark.xdist_group("sharded")
OPTIONS: dict[str, Any] = {"strategy": "fsdp2", "validate": False, "max_epochs": 2}
KILLS = int(os.environ.get("SHARDED_KILLS", "12"))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run(processes: fits.Fits, folder: Path, ranks: int = 2, **options: Any) -> int:
    places = {"ranks": ranks, "port": free_port()} if ranks > 1 else {"devices": 1}
    return processes.run(folder, **{**OPTIONS, **places, **options})


@pytest.fixture(scope="module")
def written(processes: fits.Fits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that saved in the background; nobody writes to it."""
    folder = tmp_path_factory.mktemp("sharded")
    checkpoint = {"every_n_epochs": 0.4, "async_save": True}
    assert run(processes, folder, data="ranks", checkpoint=checkpoint) == 0, log(folder)
    return folder


@pytest.fixture(scope="module")
def plain(processes: fits.Fits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one whose loader has no state, which any number of ranks can be given; and it in one file."""
    folder = tmp_path_factory.mktemp("plain")
    checkpoint = {"every_n_epochs": 1, "async_save": True}
    assert run(processes, folder, data="plain", checkpoint=checkpoint) == 0, log(folder)
    path = saved(folder)[0].rename(folder / "one.ckpt")
    show_checkpoints(["checkpoints", str(path), "--consolidate"])
    return path


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    """A copy of its oldest checkpoint."""
    return Path(shutil.copytree(saved(written)[0], tmp_path / "checkpoints" / "epoch=000.42-step=000003.ckpt"))


def look(path: Path) -> CheckpointInfo:
    [info] = list_checkpoints(path.parent, verify=True)
    return info


def test_folders_that_ranks_wrote_are_listed_verified_and_last_good(written: Path) -> None:
    kept = written / "checkpoints"
    infos = {info.path.name: info for info in list_checkpoints(kept)}
    assert [infos[path.name].step for path in saved(written)] == [3, 6, 9, 12, 14]
    assert all(info.complete and info.finite and info.metrics and not info.verified for info in infos.values())
    assert all(info.is_good and info.verified for info in list_checkpoints(kept, verify=True))
    assert last_good_checkpoint(kept) == saved(written)[-1]
    assert (kept / "last.ckpt").resolve() == saved(written)[-1]


def largest_shard(path: Path) -> Path:
    return max(path.glob("*.distcp"), key=lambda shard: shard.stat().st_size)


def cut_short(path: Path) -> None:
    shard = largest_shard(path)
    shard.write_bytes(shard.read_bytes()[:-100])


def lose_shard(path: Path) -> None:
    largest_shard(path).unlink()


def lose_index(path: Path) -> None:
    (path / METADATA).unlink()


def lose_rest(path: Path) -> None:
    (path / REST).unlink()


def cut_index(path: Path) -> None:
    (path / METADATA).write_bytes((path / METADATA).read_bytes()[:200])


def strange_index(path: Path) -> None:
    (path / METADATA).write_bytes(pickle.dumps(os.path.join))


@pytest.mark.parametrize("damage", [cut_short, lose_shard, lose_index, lose_rest, cut_index, strange_index])
def test_a_folder_with_something_missing_is_not_taken_for_whole(copied: Path, damage: Callable[[Path], None]) -> None:
    damage(copied)
    [info] = list_checkpoints(copied.parent)  # without reading all of it
    assert not info.complete, info
    assert info.problem
    assert last_good_checkpoint(copied.parent) is None


def test_a_bit_that_flipped_in_a_shard_is_found(copied: Path) -> None:
    weight = next(part for part in parts(copied) if part.name == "state_dict.net.0.weight")
    shard = copied / weight.file
    content = bytearray(shard.read_bytes())
    piece = content[weight.offset : weight.offset + weight.length]
    numbers = torch.load(io.BytesIO(piece), weights_only=True).numpy().tobytes()
    content[weight.offset + piece.index(numbers) + 5] ^= 1
    shard.write_bytes(content)
    assert list_checkpoints(copied.parent)[0].complete
    assert "damaged" in look(copied).problem
    assert last_good_checkpoint(copied.parent) is None


def test_an_index_runs_no_code(copied: Path, tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    (copied / METADATA).write_bytes(pickle.dumps(Touch()))
    assert not look(copied).complete
    assert not (tmp_path / "ran").exists()


def test_shards_put_together_are_one_file_with_the_same_numbers(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = Path(shutil.copytree(written / "checkpoints", tmp_path / "checkpoints", symlinks=True))
    path = saved(tmp_path)[-1].with_suffix(".consolidated.ckpt")
    assert show_checkpoints(["checkpoints", str(kept), "--consolidate"]) == 0
    assert str(path) in capsys.readouterr().out
    one, whole = torch.load(path, weights_only=True), result(written)
    assert one["state_dict"].keys() == whole["module"].keys()
    assert all(torch.equal(one["state_dict"][name], whole["module"][name]) for name in whole["module"])
    for ours, theirs in zip(one["optimizer_states"][0]["state"].values(), whole["optimizers"][0].values(), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert list_checkpoints(path, verify=True)[0].is_good


def test_a_file_put_together_is_loaded_by_a_trainer_without_shards(plain: Path, tmp_path: Path) -> None:
    one = plain.with_suffix(".consolidated.ckpt")
    fit(tmp_path, ckpt_path=str(one), module=fits.make_sharded, validate=False, max_epochs=2, data="plain")
    start, saved_there = result(tmp_path)["at_start"], torch.load(one, weights_only=True)["state_dict"]
    assert all(torch.equal(start[name], saved_there[name]) for name in saved_there)


def test_where_no_rank_wrote_there_is_nothing_to_put_together(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "one.ckpt")
    with pytest.raises(MisconfigurationException, match="several ranks"):
        show_checkpoints(["checkpoints", str(tmp_path), "--consolidate"])


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_shards_are_loaded_exactly_by_any_number_of_ranks(
    processes: fits.Fits, tmp_path: Path, plain: Path, ranks: int
) -> None:
    assert run(processes, tmp_path, ranks, ckpt_path=str(plain), data="plain") == 0, log(tmp_path)
    one = torch.load(plain.with_suffix(".consolidated.ckpt"), weights_only=True)["state_dict"]
    start = result(tmp_path)["at_start"]
    assert all(torch.equal(start[name], one[name]) for name in one)
    assert all(info.is_good for info in list_checkpoints(tmp_path / "checkpoints"))


def test_two_ranks_resume_exactly_and_say_so(processes: fits.Fits, tmp_path: Path, written: Path) -> None:
    options = {"data": "ranks", "checkpoint": {"every_n_epochs": 0.4, "async_save": True}}
    assert run(processes, tmp_path, ckpt_path=str(saved(written)[1]), seed=9, **options) == 0, log(tmp_path)
    for rank in range(2):
        assert_same(result(tmp_path, rank), result(written, rank))
        assert result(tmp_path, rank)["proved"] == (True, 3)


@pytest.mark.slow
def test_killed_ranks_leave_whole_folders_and_end_exactly(processes: fits.Fits, tmp_path: Path) -> None:
    rng, kills = random.Random(0), 0
    options = {"data": "ranks", "checkpoint": {"every_n_epochs": 0.2, "async_save": True, "save_top_k": 1}}
    assert run(processes, tmp_path / "reference", **options) == 0, log(tmp_path / "reference")
    while kills < KILLS:
        killed = tmp_path / f"killed-{kills}"
        for attempt in range(9):  # the last one is left alone
            path = last_good_checkpoint(killed / "checkpoints")
            where: dict[str, Any] = {"killed_rank": rng.randrange(2)}
            where[rng.choice(["kill_at_write", "kill_at_write", "kill_after_batch"])] = rng.randrange(1, 12)
            resume = {"ckpt_path": str(path), "seed": 50 + attempt} if path else {}
            status = run(processes, killed, **options, **resume, **(where if attempt < 8 else {}))
            infos = list_checkpoints(killed / "checkpoints", verify=True)
            assert all(info.is_good for info in infos), f"{where} {infos}"
            kills += status != 0
            if status == 0:
                break
        for rank in range(2):
            assert_same(result(killed, rank), result(tmp_path / "reference", rank))
