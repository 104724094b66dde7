"""What is on the disk at every moment of a write."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_stability import atomic
from lightning_stability.checkpointing import last_good_checkpoint, list_checkpoints
from lightning_stability.checkpointing.snapshot import HostSnapshot
from lightning_stability.checkpointing.writing import WriteJob, Writer, remove_parts, run, write_file


def job(folder: Path, step: int, outdated: list[str] | None = None, **options: Any) -> WriteJob:
    state = {"state_dict": {"weight": torch.full((1000,), float(step))}, "global_step": step}
    path = str(folder / f"step={step}.ckpt")
    last = str(folder / "last.ckpt")
    return WriteJob(path, lambda part: write_file(state, part), last, outdated=outdated or [], **options)


def watch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Note what is listed, and whether all of it loads, before and after every call that changes the disk."""
    moments: list[tuple[str, ...]] = []

    def note() -> None:
        infos = list_checkpoints(folder, verify=True)
        assert all(info.is_good for info in infos), infos
        moments.append(tuple(sorted(f"{info.path.name}:{info.step}" for info in infos)))

    def spy(module: Any, name: str) -> None:
        original = getattr(module, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            note()
            result = original(*args, **kwargs)
            note()
            return result

        monkeypatch.setattr(module, name, noted)

    for name in ("replace", "link", "fsync"):
        spy(os, name)
    spy(Path, "unlink")
    return moments


@pytest.mark.parametrize("link", [False, True])
def test_at_every_moment_all_that_is_listed_loads_and_the_old_goes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: bool
) -> None:
    run(job(tmp_path, 1, link=link))
    moments = watch(tmp_path, monkeypatch)
    run(job(tmp_path, 2, [str(tmp_path / "step=1.ckpt")], link=link))
    assert list(dict.fromkeys(moments)) == [
        ("last.ckpt:1", "step=1.ckpt:1"),
        ("last.ckpt:1", "step=1.ckpt:1", "step=2.ckpt:2"),
        ("last.ckpt:2", "step=1.ckpt:1", "step=2.ckpt:2"),
        ("last.ckpt:2", "step=2.ckpt:2"),
    ]
    assert (tmp_path / "last.ckpt").is_symlink() == link


def test_last_takes_no_room(tmp_path: Path) -> None:
    run(job(tmp_path, 1))
    assert (tmp_path / "last.ckpt").stat().st_ino == (tmp_path / "step=1.ckpt").stat().st_ino


def test_a_file_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(str(Path(f"/proc/self/fd/{fd}").readlink())), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(f"-> {Path(b).name}"), replace(a, b)))
    run(job(tmp_path, 1))
    assert calls[0].endswith(".part")
    assert calls[1:3] == ["-> step=1.ckpt", str(tmp_path)]
    assert calls[-2:] == ["-> last.ckpt", str(tmp_path)]


def fill_the_disk(folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    with pytest.raises((OSError, RuntimeError)):
        run(job(folder, 2, [str(folder / "step=1.ckpt")]))


def test_a_full_disk_leaves_what_there_was_and_nothing_else(tmp_path: Path) -> None:
    run(job(tmp_path, 1))
    process = multiprocessing.get_context("fork").Process(target=fill_the_disk, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step=1.ckpt"]
    assert last_good_checkpoint(tmp_path) == tmp_path / "step=1.ckpt"


def test_a_full_disk_is_said_with_what_is_needed_and_free(small_disk: Path) -> None:
    run(job(small_disk, 1))
    state = {"state_dict": {"weight": torch.ones(100_000)}}
    with pytest.raises(atomic.DiskFullError) as error:
        write_file(state, str(small_disk / "step=1.ckpt"))
    assert str(error.value) == "the disk is full: 0.4 MB needed, 0.3 MB free"
    assert sorted(path.name for path in small_disk.iterdir()) == ["last.ckpt", "step=1.ckpt"]
    assert last_good_checkpoint(small_disk) == small_disk / "step=1.ckpt"
    write_file(state, str(small_disk.parent / "whole.ckpt"))
    assert (small_disk.parent / "whole.ckpt").stat().st_size == error.value.needed


def test_a_disk_that_takes_no_more_files_is_not_said_to_lack_room(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=3", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    try:
        for number in range(2):
            (folder / str(number)).touch()
        with pytest.raises(atomic.DiskFullError, match="it is a quota, or the number of files, that is used up"):
            write_file({"weight": torch.rand(100)}, str(folder / "a.ckpt"))
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_in_place_of_a_file_stays_with_all_that_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    (tmp_path / "report.json" / "mine").touch()
    with pytest.raises(OSError, match="directory"):
        atomic.replace_file(tmp_path / "report.json", lambda file: file.write(b"{}"))
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json" / "mine").is_file()


def test_a_file_of_any_kind_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    atomic.replace_file(path, lambda file: file.write(b"first"))

    def half(file: Any) -> None:
        file.write(b"sec")
        raise ValueError("no second one")

    with pytest.raises(ValueError, match="no second one"):
        atomic.replace_file(path, half)
    with pytest.raises(OSError, match="3 of 6 bytes"):
        atomic.replace_file(path, lambda file: (file.write(b"second"), file.flush(), os.truncate(file.name, 3)))
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_after_the_checkpoint_is_there_is_no_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(job(tmp_path, 1))
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name == "step=1.ckpt":
            raise PermissionError(13, "not yours")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    second = job(tmp_path, 2, [str(tmp_path / "step=1.ckpt"), str(tmp_path / "gone.ckpt")])
    run(second)
    assert isinstance(second.trouble, PermissionError)
    assert second.outdated == [str(tmp_path / "gone.ckpt")], "what is still there is not counted as deleted"
    assert last_good_checkpoint(tmp_path) == tmp_path / "step=2.ckpt"


def test_nothing_is_deleted_while_last_may_still_lead_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(job(tmp_path, 1, link=True))
    replace = os.replace

    def refuse(source: Any, target: Path) -> None:
        if target.name == "last.ckpt":
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    second = job(tmp_path, 2, [str(tmp_path / "step=1.ckpt")], link=True)
    run(second)
    assert second.trouble is not None
    assert all(info.is_good for info in list_checkpoints(tmp_path))
    assert last_good_checkpoint(tmp_path) == tmp_path / "step=2.ckpt"


def test_what_a_dead_process_left_is_deleted_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead, host = int(done.stdout), os.uname().nodename.replace(".", "_")
    keep = [f".a.ckpt.{host}-{os.getpid()}.part", f".a.ckpt.elsewhere-{dead}.part", ".a.part", "a.ckpt"]
    for name in [*keep, f".a.ckpt.{host}-{dead}.part"]:
        (tmp_path / name).write_text("x")
    remove_parts(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(keep)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process does not say when it began")
def test_another_process_that_was_given_a_dead_ones_number_keeps_nothing_of_it(tmp_path: Path) -> None:
    left = tmp_path / f".a.ckpt.{os.uname().nodename.replace('.', '_')}-{os.getpid()}.part"
    left.write_text("x")
    os.utime(left, (0, 0))  # long before this process began
    remove_parts(str(tmp_path))
    assert not left.exists()


def test_writes_to_any_file_system_that_fsspec_knows() -> None:
    import fsspec

    folder = "memory://bucket/run"
    run(WriteJob(f"{folder}/a.ckpt", lambda path: write_file({"a": 1}, path), f"{folder}/last.ckpt"))
    second = lambda path: write_file({"a": 2}, path)  # noqa: E731
    run(WriteJob(f"{folder}/b.ckpt", second, f"{folder}/last.ckpt", outdated=[f"{folder}/a.ckpt"]))
    memory = fsspec.filesystem("memory")
    assert sorted(name.rsplit("/", 1)[1] for name in memory.ls("/bucket/run", detail=False)) == ["b.ckpt", "last.ckpt"]
    with memory.open("/bucket/run/last.ckpt") as file:
        assert torch.load(file, weights_only=True) == {"a": 2}


def test_one_checkpoint_at_a_time_and_errors_come_back(tmp_path: Path) -> None:
    writer = Writer(in_background=True)
    writer.submit(job(tmp_path, 1))
    with pytest.raises(AssertionError, match="one checkpoint at a time"):
        writer.submit(job(tmp_path, 2))
    assert writer.wait() is None
    broken = job(tmp_path, 3)
    broken.write = lambda part: (_ for _ in ()).throw(OSError("No space left on device"))
    writer.submit(broken)
    assert isinstance(writer.wait(), OSError)
    writer.close()
    assert not (tmp_path / "step=3.ckpt").exists()


def test_a_snapshot_keeps_ties_and_strides_and_uses_its_memory_again() -> None:
    tied = torch.arange(6.0).reshape(2, 3)
    state = {"a": tied, "b": [tied, tied.t()], "c": (1, {"d": torch.tensor(2)}), "e": torch.zeros(0)}
    snapshot = HostSnapshot()
    first, wait = snapshot.take(state)
    wait()
    tied.zero_()
    assert first["a"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert first["a"].data_ptr() == first["b"][0].data_ptr()
    assert first["b"][1].stride() == (1, 3)
    again, _ = snapshot.take(state)
    assert again["a"].data_ptr() == first["a"].data_ptr()
    assert again["a"].sum() == 0


def test_a_copy_that_was_begun_is_what_is_taken() -> None:
    weight, other = torch.ones(3), torch.zeros(3)
    snapshot = HostSnapshot()
    snapshot.begin([weight])
    weight.fill_(7.0)
    taken, wait = snapshot.take({"weight": weight, "other": other})
    wait()
    assert taken["weight"].tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(taken["other"], other)
    again, _ = snapshot.take({"weight": weight})
    assert again["weight"].tolist() == [7.0, 7.0, 7.0]


def test_a_copy_that_was_begun_and_not_taken_is_forgotten() -> None:
    weight = torch.ones(3)
    snapshot = HostSnapshot()
    snapshot.begin([weight])
    weight.fill_(7.0)
    snapshot.begin([weight])
    taken, _ = snapshot.take({"weight": weight})
    assert taken["weight"].tolist() == [7.0, 7.0, 7.0]
