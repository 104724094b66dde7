"""Every block of the README and the pages is run: Python as it stands, commands small, the long ones as typed."""

from __future__ import annotations

import contextlib
import queue
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lightning_stability.tuab import EEGPTEncoder, SyntheticCorpus
from tests.command import Launcher
from tests.docs.blocks import Block, blocks_of, commands_of, files_of, matches, pages
from tests.docs.commands import SHOWN, VARIABLE, Desk
from tests.docs.prelude import END_OF_BLOCK
from tests.tuab.test_encoder import published_form

pytestmark = pytest.mark.xdist_group("docs")

# Their commands take minutes, and what they show is the point: `make test-slow` runs them as typed and compares the
# output with every number in it. `make test` has their options checked.
AS_TYPED = ("docs/my_loss_is_nan.md",)
KNOWN_LANGUAGES = ("python", "console", "text", "mermaid")
IN_FILES = ("python", "bash")

ALL = [block for page in pages() for block in blocks_of(page)]
CONSOLE = [block for block in ALL if block.language == "console"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, its cache and an encoder that the commands of all blocks find in their folder."""
    folder = tmp_path_factory.mktemp("shared")
    SyntheticCorpus(train_subjects=12, eval_subjects=4, seconds=(16, 20)).write(folder / "tuab_synthetic")
    (folder / "tuab_cache").mkdir()
    torch.save(published_form(EEGPTEncoder(embed_dim=64, depth=2, num_heads=4)), folder / "eegpt.ckpt")
    return folder


@pytest.fixture
def desk(shared: Path, tmp_path: Path, command: Launcher) -> Iterator[Desk]:
    for found in shared.iterdir():
        (tmp_path / found.name).symlink_to(found)
    return Desk(tmp_path, command)


def test_every_block_says_what_it_is():
    strange = [b for b in ALL if b.language not in (IN_FILES if b.title else KNOWN_LANGUAGES)]
    assert [str(block) for block in strange] == []


@pytest.mark.parametrize("page", [page for page in pages() if files_of(page)])
def test_a_page_runs_every_file_that_it_has_a_reader_save(page):
    words = {word for b in blocks_of(page, "console") for command in commands_of(b) for word in command.words}
    called = words | {word for text in files_of(page).values() for word in text.split()}
    assert files_of(page).keys() <= called


@pytest.mark.parametrize("page", [page for page in pages() if any(not b.title for b in blocks_of(page, "python"))])
def test_the_python_of_a_page_runs(page, command, tmp_path):
    blocks = [block for block in blocks_of(page, "python", "text") if not block.title]
    python = [(str(block), block.text) for block in blocks if block.language == "python"]
    program = f"from tests.docs.prelude import run\nrun({python!r})"
    done = command("-c", program, cwd=tmp_path, env={VARIABLE: None})
    assert done.returncode == 0, done.stdout + done.stderr
    # a `text` block is output of the Python above it
    said = [out + err for out, err in zip(*(s.split(END_OF_BLOCK) for s in (done.stdout, done.stderr)), strict=True)]
    above = -1
    for block in blocks:
        if block.language == "python":
            above += 1
        else:
            assert above >= 0, f"{block} shows the output of nothing"
            assert matches(block.text, said[above], same_numbers=False), (
                f"{block} shows something else than\n{said[above]}"
            )


def _in_a_folder_each() -> list[list[Block]]:
    """The console blocks; those of a page that has a reader save files are run in one folder, in order."""
    found: list[list[Block]] = []
    for block in CONSOLE:
        if found and found[-1][0].page == block.page and files_of(block.page):
            found[-1].append(block)
        elif block.page not in AS_TYPED:
            found.append([block])
    return found


@pytest.mark.parametrize("blocks", _in_a_folder_each(), ids=lambda blocks: str(blocks[0]))
def test_the_commands_of_a_block_run(blocks, desk):
    for name, text in files_of(blocks[0].page).items():
        (desk.folder / name).write_text(text)
    for block in blocks:
        _run(block, desk)


@pytest.mark.parametrize("block", [b for b in CONSOLE if b.page in AS_TYPED], ids=str)
def test_the_options_of_long_commands_are_known(block, command, tmp_path):
    for each in commands_of(block):
        if each.words[:2] == ["lightning-stability", "fit"]:
            done = command(*each.words[1:], "--print_config", cwd=tmp_path, env={VARIABLE: "none"})
            assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", AS_TYPED)
def test_the_commands_of_a_walk_through_run_as_typed_and_say_what_it_shows(page, tmp_path, monkeypatch):
    """Two at a time: the first block writes the corpus and its cache, which those after it read, each in its folder."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    first, *others = blocks_of(page, "console")
    with contextlib.closing(Launcher()) as one, contextlib.closing(Launcher()) as another:
        desk = Desk(tmp_path / "first", one, as_typed=True)
        desk.folder.mkdir()
        _run(first, desk)
        idle = queue.SimpleQueue[Launcher]()
        idle.put(one)
        idle.put(another)

        def run(number: int, blocks: list[Block]) -> None:
            folder = tmp_path / str(number)
            folder.mkdir()
            for found in ("tuab_synthetic", "tuab_cache"):
                (folder / found).symlink_to(desk.folder / found)
            launcher = idle.get()
            try:
                for block in blocks:
                    _run(block, Desk(folder, launcher, as_typed=True, env=desk.env))
            finally:
                idle.put(launcher)

        with ThreadPoolExecutor(2) as pool:
            done = [pool.submit(run, number, blocks) for number, blocks in enumerate(_longest_first(others))]
    failed = [str(error) for each in done if (error := each.exception()) is not None]
    assert not failed, "\n\n".join(failed)


def _longest_first(blocks: list[Block]) -> list[list[Block]]:
    """The blocks of a walk-through that need each other, as they use a corpus that one of them writes, together."""
    corpus = re.compile(r"--data\.root=(\w+)|synthetic (\w+)")
    together: dict[object, list[Block]] = {}
    for block in blocks:
        found = corpus.search(block.text)
        together.setdefault(found[1] or found[2] if found else block, []).append(block)
    return sorted(together.values(), key=len, reverse=True)


def _run(block: Block, desk: Desk) -> None:
    """Run the commands of a block; compare their output and status with what it shows."""
    for command in commands_of(block):
        done = desk.run(command)
        shown = "\n".join(command.shown)
        if done is None:
            if str(command) not in SHOWN:
                assert not shown, f"{block}: nothing runs `{command}`, so its output cannot be shown"
            continue
        output = f"{done.stderr}\n{done.stdout}"
        expects_error = re.search(r"^(\w+Error|[\w-]+: error):", shown, re.MULTILINE) is not None
        assert (done.returncode != 0) == expects_error, f"{block}: `{command}` ended with {done.returncode}\n{output}"
        assert matches(shown, output, desk.as_typed), f"{block}: `{command}` shows something else than\n{output}"
