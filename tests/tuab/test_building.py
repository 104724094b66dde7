"""Caches whose builders are killed, meet each other, or run out of disk."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_stability.tuab import WindowCache, build_cache, find_recordings
from lightning_stability.tuab import building as building_module
from lightning_stability.tuab import preprocessing as preprocessing_module
from lightning_stability.tuab.index import read_index
from lightning_stability.tuab.preprocessing import preprocess, suitable_processes
from tests.command import run_python

pytestmark = pytest.mark.filterwarnings("ignore:.*left out", "ignore:.*beyond the range of fp16")
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def expected(damaged_corpus: Path) -> dict[str, Any]:
    """What becomes of each recording, read alone."""
    return {r.path: preprocess(damaged_corpus / r.path) for r in find_recordings(damaged_corpus)}


def check(folder: Path, expected: dict[str, Any]) -> None:
    cache = WindowCache(folder)
    assert [r.path for r in cache.recordings] == [p for p, result in expected.items() if result.samples is not None]
    for number, recording in enumerate(cache.recordings):
        assert cache.read(number).tobytes() == expected[recording.path].samples.tobytes()
    assert cache.skipped == {path: result.reason for path, result in expected.items() if result.samples is None}
    assert (folder / "skipped.txt").read_text().startswith(f"1 of {len(expected)} recordings were left out.\nedf/")


class Builder:
    """A process that builds, and tells in a file which recordings it read.

    Args:
        corpus: The corpus' root.
        folder: Where to build.
        dies_in: The write in whose middle it is killed, counted from 1.
        waits_at: How many recordings it finishes before it waits for `go_on`.
        processes: How many preprocess.
    """

    def __init__(
        self, corpus: Path, folder: Path, dies_in: int | None = None, waits_at: int | None = None, processes: int = 1
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.log = folder.parent / f"read-{time.monotonic_ns()}.txt"
        self.log.touch()
        self.error, self._gate = self.log.with_suffix(".error"), self.log.with_suffix(".go")
        self._dies_in, self._waits_at, self._writes = dies_in, waits_at, 0
        self.process = FORK.Process(target=self._build, args=(corpus, folder, processes))
        self.process.start()

    def _build(self, corpus: Path, folder: Path, processes: int) -> None:
        read, add, write = preprocessing_module.read_recording, building_module._Writer.add, building_module._write

        def tell(path: Path) -> Any:
            with self.log.open("a") as log:
                log.write(f"{path.relative_to(corpus).as_posix()}\n")
            return read(path)

        def add_and_wait(writer: Any, *args: Any) -> None:
            add(writer, *args)
            if len(writer.index.files) == self._waits_at:
                parent = os.getppid()
                while not self._gate.exists() and os.getppid() == parent:
                    time.sleep(0.002)

        def write_or_die(descriptor: int, content: Any, offset: int | None = None) -> None:
            self._writes += 1
            if self._writes == self._dies_in:
                write(descriptor, content[: len(content) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            write(descriptor, content, offset)

        preprocessing_module.read_recording = tell
        building_module._Writer.add = add_and_wait  # type: ignore[method-assign]
        building_module._write = write_or_die  # type: ignore[assignment]
        try:
            build_cache(corpus, find_recordings(corpus), folder, processes)
        except Exception as error:
            self.error.write_text(f"{type(error).__name__}: {error}")
            raise

    @property
    def read(self) -> list[str]:
        return self.log.read_text().splitlines()

    def go_on(self) -> None:
        self._gate.touch()

    def end(self) -> int | None:
        self.process.join(300)
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def wait_for(condition: Any, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def finished(folder: Path) -> set[str]:
    return set(read_index(folder).files)


def test_a_build_that_is_killed_in_random_writes_ends_with_the_same_cache_and_reads_nothing_finished_again(
    damaged_corpus: Path, tmp_path: Path, expected: dict[str, Any]
) -> None:
    moments, kills, status = random.Random(0), 0, None
    while status != 0:
        before = finished(tmp_path / "cache")
        builder = Builder(damaged_corpus, tmp_path / "cache", dies_in=moments.randint(1, 12))
        status = builder.end()
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        assert kills < 40, "it comes to no end"
        assert not before & set(builder.read)
    assert kills >= 3
    check(tmp_path / "cache", expected)


@pytest.fixture(scope="module")
def whole(damaged_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    build_cache(damaged_corpus, find_recordings(damaged_corpus), folder)
    return folder


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_wherever_a_kill_cut_the_files_the_build_goes_on_and_reads_only_what_is_missing(
    damaged_corpus: Path,
    tmp_path: Path,
    expected: dict[str, Any],
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    data: st.DataObject,
) -> None:
    folder = tmp_path / "cache"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    index = folder / "index.jsonl"
    os.truncate(index, data.draw(st.integers(0, index.stat().st_size)))
    # samples reach the disk before their line does, so that there may be too many but never too few
    rows = read_index(folder).rows
    os.truncate(folder / "samples.f16", data.draw(st.integers(rows * 38, (whole / "samples.f16").stat().st_size)))
    before, read = finished(folder), []

    def known(path: Path) -> Any:
        read.append(path.relative_to(damaged_corpus).as_posix())
        return expected[read[-1]]

    complete = read_index(folder).complete
    if complete:  # nothing was cut off the index
        shutil.copy(whole / "samples.f16", folder)
    monkeypatch.setattr(preprocessing_module, "preprocess", known)
    build_cache(damaged_corpus, find_recordings(damaged_corpus), folder)
    assert set(read) == expected.keys() - before
    assert len(read) == len(set(read))
    check(folder, expected)


def test_of_two_builders_one_works_and_both_end_with_the_cache(
    damaged_corpus: Path, tmp_path: Path, expected: dict[str, Any]
) -> None:
    builders = [Builder(damaged_corpus, tmp_path / "cache", waits_at=3) for _ in range(2)]
    wait_for(lambda: len(finished(tmp_path / "cache")) == 3)
    for builder in builders:
        builder.go_on()
    assert [builder.end() for builder in builders] == [0, 0]
    assert sorted(map(len, (builder.read for builder in builders))) == [0, len(expected)]
    check(tmp_path / "cache", expected)


def test_a_builder_that_waits_takes_over_from_one_that_is_killed(
    damaged_corpus: Path, tmp_path: Path, expected: dict[str, Any]
) -> None:
    folder = tmp_path / "cache"
    first = Builder(damaged_corpus, folder, waits_at=3)
    wait_for(lambda: len(finished(folder)) == 3)
    second = Builder(damaged_corpus, folder)
    time.sleep(0.2)  # in which it would read, if it did not wait
    assert second.read == []
    first.kill()
    done = finished(folder)
    assert len(done) == 3
    assert second.end() == 0
    assert set(second.read) == expected.keys() - done
    check(folder, expected)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_new_interpreter_preprocesses_as_this_one_does_and_ends_when_its_connection_is_closed(
    damaged_corpus: Path, expected: dict[str, Any]
) -> None:
    connection, process = preprocessing_module._start()
    try:
        for path in list(expected)[:2]:
            connection.send(damaged_corpus / path)
            np.testing.assert_array_equal(connection.recv().samples, expected[path].samples)
        os.kill(process.pid, signal.SIGINT)  # of a Ctrl-C, which all processes get: the builder decides
        connection.send(damaged_corpus / next(iter(expected)))
        assert connection.recv().samples is not None
        connection.close()  # as a kill of the builder does
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
        process.wait()


def builder_at_work(corpus: Path, folder: Path) -> tuple[Builder, list[int]]:
    """With its two processes, once some recordings are finished and some are not."""
    builder = Builder(corpus, folder, waits_at=3, processes=2)
    wait_for(lambda: len(finished(folder)) == 3)
    assert builder.process.pid is not None
    return builder, children(builder.process.pid)


@pytest.mark.slow
def test_processes_fill_the_cache_with_the_same_bits_and_end_when_the_builder_is_killed(
    damaged_corpus: Path, tmp_path: Path, expected: dict[str, Any]
) -> None:
    folder = tmp_path / "cache"
    builder, workers = builder_at_work(damaged_corpus, folder)
    assert len(workers) == 2
    builder.kill()
    assert builder.read == []  # the others read
    done = finished(folder)
    assert len(done) == 3
    resumed = Builder(damaged_corpus, folder)  # although the other one's processes may still be at their last file
    assert resumed.end() == 0
    assert set(resumed.read) == expected.keys() - done
    check(folder, expected)
    wait_for(lambda: not any(map(alive, workers)))


class Forked:
    """A process that preprocesses, without the seconds that a new interpreter imports for."""

    def __init__(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        self.process = FORK.Process(target=preprocessing_module.serve, args=(theirs.fileno(),))
        self.process.start()
        theirs.close()

    def kill(self) -> None:
        self.process.kill()

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode


@pytest.mark.parametrize("processes", [2, 3, 5])
@pytest.mark.parametrize("count", [3, 7])
def test_however_many_processes_there_are_each_recording_is_preprocessed_once(
    damaged_corpus: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, processes: int, count: int
) -> None:
    started: list[Forked] = []

    def start() -> Any:
        started.append(Forked())
        return started[-1].connection, started[-1]

    monkeypatch.setattr(preprocessing_module, "_start", start)
    recordings = find_recordings(damaged_corpus)[:count]
    results = list(preprocessing_module.preprocess_all(damaged_corpus, recordings, processes))
    assert sorted(recording.path for recording, _ in results) == sorted(recording.path for recording in recordings)
    for recording, result in results:
        np.testing.assert_array_equal(result.samples, expected[recording.path].samples)
    assert len(started) == min(processes, count)
    assert not any(worker.process.is_alive() for worker in started)


def test_an_error_that_is_not_the_files_ends_the_build_with_where_it_came_from(
    damaged_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start() -> Any:
        worker = Forked()
        return worker.connection, worker

    def no_memory(path: Path) -> Any:
        raise MemoryError

    monkeypatch.setattr(preprocessing_module, "_start", start)
    monkeypatch.setattr(preprocessing_module, "read_recording", no_memory)
    with pytest.raises(RuntimeError, match=r"Preprocessing edf/.* failed:\nTraceback[^$]*MemoryError"):
        build_cache(damaged_corpus, find_recordings(damaged_corpus), tmp_path, processes=2)


@pytest.mark.slow
def test_a_killed_process_ends_the_build_with_a_message_and_what_is_finished_stays(
    damaged_corpus: Path, tmp_path: Path, expected: dict[str, Any]
) -> None:
    folder = tmp_path / "cache"
    builder, workers = builder_at_work(damaged_corpus, folder)
    os.kill(workers[0], signal.SIGKILL)
    builder.go_on()
    assert builder.end() == 1
    assert "ended with status -9" in builder.error.read_text()
    assert "edf/" in builder.error.read_text()
    wait_for(lambda: not any(map(alive, workers)))
    done = finished(folder)
    resumed = Builder(damaged_corpus, folder)
    assert resumed.end() == 0
    assert set(resumed.read) == expected.keys() - done
    check(folder, expected)


@pytest.mark.slow
def test_a_script_needs_no_guard_for_its_processes(
    damaged_corpus: Path, tmp_path: Path, expected: dict[str, Any]
) -> None:
    (tmp_path / "script.py").write_text(
        "from lightning_stability.tuab import build_cache, find_recordings\n"
        "print('once')\n"
        f"build_cache({str(damaged_corpus)!r}, find_recordings({str(damaged_corpus)!r}), 'cache', processes=2)\n"
    )
    done = run_python("script.py", cwd=tmp_path)
    assert (done.returncode, done.stdout.split()[:1]) == (0, ["once"]), done.stderr
    assert done.stdout.count("once") == 1
    assert f"{len(expected)}/{len(expected)}" in done.stderr  # the progress bar
    assert "skipped=1" in done.stderr
    check(tmp_path / "cache", expected)


def test_an_interrupted_build_goes_on_where_it_was(
    damaged_corpus: Path, tmp_path: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def interrupted(path: Path) -> Any:
        if len(read) == 3:
            raise KeyboardInterrupt
        read.append(path.relative_to(damaged_corpus).as_posix())
        return expected[read[-1]]

    recordings = find_recordings(damaged_corpus)[::-1]  # in whatever order they are finished, the cache has its own
    monkeypatch.setattr(preprocessing_module, "preprocess", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_cache(damaged_corpus, recordings, tmp_path)
    assert finished(tmp_path) == set(read)
    monkeypatch.setattr(
        preprocessing_module, "preprocess", lambda path: expected[str(path.relative_to(damaged_corpus))]
    )
    build_cache(damaged_corpus, recordings, tmp_path)
    check(tmp_path, expected)


def test_a_file_that_changed_while_its_build_lay_still_is_refused_and_a_new_one_is_added(
    corpus: Path, tmp_path: Path
) -> None:
    copy, folder = shutil.copytree(corpus, tmp_path / "copy"), tmp_path / "cache"
    build_cache(copy, find_recordings(copy)[:3], folder)
    index = folder / "index.jsonl"
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:-1]))
    build_cache(copy, find_recordings(copy)[:4], folder)
    assert len(WindowCache(folder).recordings) == 4
    with pytest.raises(MisconfigurationException, match=r"has changed since .* 1 files are new, gone"):
        build_cache(copy, find_recordings(copy)[:5], folder)
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:-1]))
    os.utime(copy / find_recordings(copy)[0].path)
    with pytest.raises(MisconfigurationException, match=r"has changed since .* 1 files are new, gone"):
        build_cache(copy, find_recordings(copy)[:5], folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_on_a_full_disk_the_build_says_so_and_goes_on_when_there_is_room(
    damaged_corpus: Path, small_disk: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, read = small_disk / "cache", []

    def known(path: Path) -> Any:
        read.append(path.relative_to(damaged_corpus).as_posix())
        return expected[read[-1]]

    monkeypatch.setattr(preprocessing_module, "preprocess", known)
    with pytest.raises(MisconfigurationException, match=r"No space left on device\. What is finished stays"):
        build_cache(damaged_corpus, find_recordings(damaged_corpus), folder)
    done = finished(folder)
    assert done == set(read[:-1])
    assert len(done) >= 2
    assert (folder / "samples.f16").stat().st_size == read_index(folder).rows * 38
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    read.clear()
    build_cache(damaged_corpus, find_recordings(damaged_corpus), folder)
    assert set(read) == expected.keys() - done
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    build_cache(damaged_corpus, find_recordings(damaged_corpus), folder)  # a finished cache need not be writable
    check(folder, expected)


def test_a_folder_that_cannot_be_written_is_refused_with_the_reason(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MisconfigurationException, match=r"cannot be written to .*file"):
        build_cache(corpus, find_recordings(corpus), tmp_path / "file" / "cache")


def test_a_file_system_without_locks_is_warned_of(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*args: Any) -> None:
        raise OSError("Function not implemented")

    monkeypatch.setattr(building_module.fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="has no locks .* two processes that build one cache at the same time"):
        build_cache(corpus, find_recordings(corpus)[:1], tmp_path)
    assert len(WindowCache(tmp_path).recordings) == 1


def test_processes_are_as_many_as_cores_that_may_be_used_but_no_more_than_are_worth_it() -> None:
    cores = os.sched_getaffinity(0)
    assert suitable_processes(50_000_000) == 1
    assert suitable_processes(10**12) == min(16, len(cores))
    os.sched_setaffinity(0, {min(cores)})
    try:
        assert suitable_processes(10**12) == 1
    finally:
        os.sched_setaffinity(0, cores)


def test_a_link_to_nowhere_and_a_folder_in_a_files_place_are_left_out(corpus: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(corpus, tmp_path / "copy")
    first, second, *_ = find_recordings(copy)
    (copy / first.path).unlink()
    (copy / first.path).symlink_to("annex/object")
    (copy / second.path).unlink()
    (copy / second.path).mkdir()
    build_cache(copy, find_recordings(copy)[:3], tmp_path / "cache")
    cache = WindowCache(tmp_path / "cache")
    assert len(cache.recordings) == 1
    assert set(cache.skipped) == {first.path, second.path}
    assert all(reason.startswith("not readable as EDF: ") for reason in cache.skipped.values())


def test_clipped_values_are_told_of_again_by_the_build_that_ends(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_ = np.full((19, 512), 1e6, dtype=np.float32)
    monkeypatch.setattr(preprocessing_module, "read_recording", lambda path: signal_)
    recordings = find_recordings(corpus)
    with pytest.warns(UserWarning, match="9728 of 9728 samples"):
        build_cache(corpus, recordings[:1], tmp_path)
    index = tmp_path / "index.jsonl"
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:-1]))
    with pytest.warns(UserWarning, match="19456 of 19456 samples"):
        build_cache(corpus, recordings[:2], tmp_path)
