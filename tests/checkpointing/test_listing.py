"""Which checkpoints are good, and which is the newest of those."""

import os
import socket
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_stability.checkpointing import last_good_checkpoint, list_checkpoints, verification
from lightning_stability.checkpointing.listing import table
from lightning_stability.health.values import nonfinite_names


def write(path: Path, step: int, weight: float = 1.0, **section: object) -> Path:
    checkpoint = {"state_dict": {"weight": torch.full((500,), weight)}, "global_step": step, "epoch": 0}
    if section:
        checkpoint["lightning_stability"] = section
    torch.save(checkpoint, path)
    os.utime(path, (1000 + step, 1000 + step))
    return path


def test_the_newest_good_one_is_neither_cut_short_nor_damaged_nor_poisoned(tmp_path: Path) -> None:
    good = write(tmp_path / "step=1.ckpt", 1)
    write(tmp_path / "step=2.ckpt", 2, weight=float("nan"))
    cut = write(tmp_path / "step=3.ckpt", 3)
    cut.write_bytes(cut.read_bytes()[:-100])
    os.utime(cut, (1003, 1003))
    (tmp_path / "step=4.ckpt").write_bytes(b"")
    (tmp_path / ".step=5.ckpt.host-1.part").write_bytes(good.read_bytes())
    (tmp_path / "gone.ckpt").symlink_to(tmp_path / "nowhere.ckpt")
    assert last_good_checkpoint(tmp_path) == good
    infos = {info.path.name: info for info in list_checkpoints(tmp_path, verify=True)}
    assert {name: (info.complete, info.finite) for name, info in infos.items()} == {
        "step=1.ckpt": (True, True),
        "step=2.ckpt": (True, False),
        "step=3.ckpt": (False, None),
        "step=4.ckpt": (False, None),
        "gone.ckpt": (False, None),
    }
    assert "weight" in infos["step=2.ckpt"].problem


@pytest.mark.parametrize("bit", [0, 6])
@pytest.mark.parametrize("section", [{}, {"finite": True}])
def test_a_flipped_bit_is_not_good(tmp_path: Path, section: dict[str, Any], bit: int) -> None:
    older = write(tmp_path / "older.ckpt", 1, **section)
    path = write(tmp_path / "newer.ckpt", 2, **section)
    content = bytearray(path.read_bytes())
    content[content.find(torch.ones(4).numpy().tobytes()) + 3] ^= 1 << bit
    path.write_bytes(content)
    os.utime(path, (1002, 1002))
    assert last_good_checkpoint(tmp_path) == older
    for verify in (False, True):
        assert [info.is_good for info in list_checkpoints(tmp_path, verify)] == [True, False]
    assert "damaged" in list_checkpoints(path, verify=True)[0].problem


def test_a_file_without_check_sums_is_looked_at_all_the_same(tmp_path: Path) -> None:
    options = getattr(torch.serialization, "set_crc32_options", None)
    if options is None:
        pytest.skip("this torch always writes them")
    options(False)
    try:
        path = write(tmp_path / "a.ckpt", 1)
        write(tmp_path / "b.ckpt", 2, weight=torch.nan)
    finally:
        options(True)
    assert last_good_checkpoint(tmp_path) == path


def test_a_read_that_takes_long_shows_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.ckpt", 1)
    assert last_good_checkpoint(tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(verification, "_SHOW_PROGRESS_AFTER", 0.0)
    assert last_good_checkpoint(tmp_path)
    assert "Verifying a.ckpt" in capsys.readouterr().err


INF, NAN = torch.inf, torch.nan
MASK = torch.tensor([0.0, -INF, 1.0])


def optimizer(lr: Any = 0.1, moment: list[float] = [0.0, 1.0, 1.0], **group: Any) -> dict[str, Any]:  # noqa: B006
    state = {0: {"step": torch.tensor(3.0), "exp_avg": torch.tensor(moment)}}
    return {"state": state, "param_groups": [{"lr": lr, "params": [0], **group}]}


def plain_moment(value: float) -> dict[str, Any]:
    return {"state": {0: {"second_moment": value}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


BUFFERS = {"weight": torch.ones(5), "other": torch.ones(2)}
STATES = {
    "a mask": (True, {"state_dict": {**BUFFERS, "mask": MASK}}),
    "a mask beside moments": (True, {"state_dict": {**BUFFERS, "mask": MASK[:2]}, "optimizer_states": [optimizer()]}),
    "a weight by its name": (False, {"state_dict": {"net.weight": MASK, **BUFFERS}}),
    "a bias": (False, {"state_dict": {"net.bias": MASK, **BUFFERS}}),
    "a weight of an lstm": (False, {"state_dict": {"lstm.weight_ih_l0": MASK, **BUFFERS}}),
    "an averaged weight": (False, {"state_dict": BUFFERS, "current_model_state": {"net.weight": MASK}}),
    "a weight by its moment": (False, {"state_dict": {**BUFFERS, "query": MASK}, "optimizer_states": [optimizer()]}),
    "the only weight": (False, {"state_dict": {"query": MASK}, "optimizer_states": [{**optimizer(), "state": {}}]}),
    "a moment": (False, {"state_dict": BUFFERS, "optimizer_states": [optimizer(moment=[0.0, INF, 1.0])]}),
    "a rate": (False, {"state_dict": BUFFERS, "optimizer_states": [optimizer(lr=INF)]}),
    "a rate in a tensor": (False, {"state_dict": BUFFERS, "optimizer_states": [optimizer(lr=torch.tensor(NAN))]}),
    "a decay": (False, {"state_dict": BUFFERS, "optimizer_states": [optimizer(weight_decay=NAN)]}),
    "a moment that is a plain number": (False, {"state_dict": BUFFERS, "optimizer_states": [plain_moment(INF)]}),
    "a scheduler's rate": (False, {"state_dict": BUFFERS, "lr_schedulers": [{"base_lrs": [0.1, NAN]}]}),
    "a scheduler's best": (True, {"state_dict": BUFFERS, "lr_schedulers": [{"best": INF, "_last_lr": [0.1]}]}),
    "a loss scale": (False, {"state_dict": BUFFERS, "MixedPrecision": {"scale": INF, "growth_factor": 2.0}}),
    "an average in a callback": (
        False,
        {"state_dict": BUFFERS, "callbacks": {"Swa": {"average_model_state": {"net.weight": MASK}}}},
    ),
    "a limit": (True, {"state_dict": BUFFERS, "optimizer_states": [optimizer(max_norm=INF)]}),
}


@pytest.mark.parametrize("name", STATES)
def test_what_may_be_infinite_is_a_mask_and_no_weight_moment_or_rate(tmp_path: Path, name: str) -> None:
    good, checkpoint = STATES[name]
    torch.save(checkpoint, tmp_path / "a.ckpt")
    [info] = list_checkpoints(tmp_path, verify=True)
    assert (info.complete, info.finite) == (True, good), info.problem
    assert last_good_checkpoint(tmp_path) == (tmp_path / "a.ckpt" if good else None)


@pytest.mark.parametrize(
    ("checkpoint", "problem"),
    [
        ({"state_dict": {}}, "its state_dict is empty"),
        ({"state_dict": {"w": torch.ones(2, device="meta")}}, "its w has a shape and no numbers"),
        ({"state_dict": BUFFERS, "optimizer_states": [optimizer(betas="0.9")]}, "expected numbers"),
        ({"state_dict": BUFFERS, "optimizer_states": [optimizer(weight_decay=[0.1])]}, "expected a number"),
        ({"state_dict": BUFFERS, "pytorch-lightning_version": 2}, "expected a str"),
    ],
)
def test_what_no_run_can_continue_from_is_not_good(tmp_path: Path, checkpoint: dict[str, Any], problem: str) -> None:
    torch.save(checkpoint, tmp_path / "a.ckpt")
    [info] = list_checkpoints(tmp_path, verify=True)
    assert problem in info.problem
    assert last_good_checkpoint(tmp_path) is None


def test_an_archive_of_others_is_one_reason_in_plain_words(tmp_path: Path) -> None:
    write(tmp_path / "a.ckpt", 1)
    content = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "a.ckpt").write_bytes(b"#!" + bytes(100) + content)
    [info] = list_checkpoints(tmp_path)
    assert info.problem == "it is no file that torch.save writes"


@pytest.mark.parametrize("form", ["in the order of saving", "in another order", "a part that nothing needs"])
def test_a_tensor_is_looked_at_as_soon_as_its_bytes_were_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """The file is read once, also where it does not fit into memory."""
    monkeypatch.setattr(verification, "_AT_ONCE", 1)
    state = {name: torch.rand(1000) for name in "abc"}
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": dict(reversed(state.items())) if "another" in form else state}, path)
    if "nothing needs" in form:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("a/data/7", b"more")
    steps: list[str] = []
    read, look = verification._read, verification.nonfinite_names
    monkeypatch.setattr(
        verification, "_read", lambda archive, part, bar: (steps.append(part.filename), read(archive, part, bar))
    )
    monkeypatch.setattr(verification, "nonfinite_names", lambda some: look([*some, *(steps.append("look") or [])]))
    assert last_good_checkpoint(tmp_path) == path
    steps = [
        step.rpartition("/")[2] if "/data/" in step else step for step in steps if "data/" in step or step == "look"
    ]
    steps = [step for step in steps if step in ("look", "0", "1", "2", "7")]
    if "nothing needs" in form:
        assert steps[:4] == ["0", "1", "2", "7"], "where they cannot be told from each other, all are compared first"
    else:
        assert steps[:6] == ["0", "look", "1", "look", "2", "look"]


def test_in_our_own_files_only_what_was_written_down_may_be_infinite(tmp_path: Path) -> None:
    section = {"finite": True, "nonfinite_by_design": ["mask"]}
    for name, state in {"a": {"mask": MASK}, "b": {"mask": MASK, "other": MASK}}.items():
        torch.save({"state_dict": state, "lightning_stability": section}, tmp_path / f"{name}.ckpt")
    assert [info.is_good for info in list_checkpoints(tmp_path)] == [True, False]


def test_what_was_found_before_the_write_is_believed_until_asked_to_verify(tmp_path: Path) -> None:
    write(tmp_path / "a.ckpt", 1, weight=float("nan"), finite=True, epochs=0.25, saved_at=5.0, metrics={"loss": 0.5})
    [info] = list_checkpoints(tmp_path)
    assert (info.finite, info.epochs, info.saved, info.metrics) == (True, 0.25, 5.0, {"loss": 0.5})
    assert "when saved" in table([info])
    assert not info.is_good
    assert list_checkpoints(tmp_path, verify=True)[0].finite is False
    assert "a.ckpt" in table([info])
    assert "loss=0.5" in table([info])


def test_whatever_is_called_ckpt_is_listed_and_nothing_ends_the_listing(tmp_path: Path) -> None:
    good = write(tmp_path / "good.ckpt", 1, finite=True, nonfinite_by_design=["mask"])
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "folder.ckpt").mkdir()
    (tmp_path / "circle.ckpt").symlink_to(tmp_path / "circle.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    torch.save({"state_dict": {}, "code": print}, tmp_path / "code.ckpt")
    averaged = {**torch.load(good), "current_model_state": {"mask": torch.tensor([-float("inf"), 0.5])}}
    torch.save(averaged, tmp_path / "averaged.ckpt")
    torch.save(averaged, tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    for verify in (False, True):
        infos = list_checkpoints(tmp_path, verify)
        assert {info.path.stem for info in infos if info.is_good} == {"good", "averaged"}
        assert len(infos) == 8
        assert "Python objects" in table(infos)
        assert "cut short" in table(infos)


WRONG_TYPES = {
    "state_dict": torch.ones(2),
    "global_step": "3",
    "epoch": None,
    "loops": [],
    "callbacks": 1,
    "optimizer_states": [1],
    "lightning_stability": "mine",
    "saved_at": "x",
    "epochs": torch.inf,
    "finite": 1,
    "run_id": 3,
    "start": 1.5,
    "metrics": {"loss": "low"},
    "nonfinite_by_design": "weight",
    "ranks": {},
    "inside_epoch": torch.ones(3),
}


@pytest.mark.parametrize("field", WRONG_TYPES)
def test_a_field_of_another_type_is_one_line_with_its_reason(tmp_path: Path, field: str) -> None:
    good = write(tmp_path / "good.ckpt", 1, finite=True, saved_at=5.0)
    odd = torch.load(write(tmp_path / "odd.ckpt", 2, finite=True))
    (odd if field in (*odd, "loops", "callbacks", "optimizer_states") else odd["lightning_stability"])[field] = (
        WRONG_TYPES[field]
    )
    torch.save(odd, tmp_path / "odd.ckpt")
    assert last_good_checkpoint(tmp_path) == good
    [line] = [line for line in table(list_checkpoints(tmp_path)).splitlines() if line.startswith("odd.ckpt")]
    assert f"{field} is " in line
    assert "expected" in line


@pytest.mark.parametrize("saved_at", [-1.0, 1e300, torch.nan, torch.inf, 10**30, True])
def test_a_time_that_no_clock_shows_is_odd(tmp_path: Path, saved_at: float) -> None:
    write(tmp_path / "odd.ckpt", 2, finite=True, saved_at=saved_at)
    assert last_good_checkpoint(tmp_path) is None
    assert "expected a time" in table(list_checkpoints(tmp_path))


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    good = write(tmp_path / "good.ckpt", 1)
    os.mkfifo(tmp_path / "pipe.ckpt")
    (tmp_path / "zero.ckpt").symlink_to("/dev/zero")
    (tmp_path / "root.ckpt").symlink_to("/")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "s.ckpt"))
    infos = list_checkpoints(tmp_path, verify=True)
    assert sorted(info.path.stem for info in infos if "no regular file" in info.problem) == ["pipe", "s", "zero"]
    assert [info.path for info in infos if info.is_good] == [good]
    assert last_good_checkpoint(tmp_path) == good
    assert last_good_checkpoint(tmp_path / "pipe.ckpt") is None


def test_names_are_shown_without_what_a_terminal_would_obey(tmp_path: Path) -> None:
    for name in ("\x1b[2Jgone.ckpt", "line\nbreak.ckpt", "\u202egpj.ckpt", "\udcff.ckpt"):
        write(tmp_path / name, 1, finite=True, metrics={"\x1b]0;title\x07": 1.0})
    write(tmp_path / "\x1b[31mred.ckpt", 2, weight=torch.nan)
    shown = table(list_checkpoints(tmp_path, verify=True))
    assert shown.replace("\n", "").isprintable()
    assert "\\x1b[2Jgone.ckpt" in shown
    assert len(shown.splitlines()) == 6


def test_a_file_that_unfolds_without_end_is_read_once(tmp_path: Path) -> None:
    nest: list[Any] = [torch.ones(2)]
    for _ in range(60):
        nest = [nest] * 10
    circle: list[Any] = []
    circle.append(circle)
    deep: list[Any] = []
    for _ in range(300):
        deep = [deep]
    states = {"nest": nest, "circle": circle, "deep": deep, "huge": torch.ones(1).expand(10**12)}
    for name, value in states.items():
        torch.save({"state_dict": {"w": value}}, tmp_path / f"{name}.ckpt")
    with zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(10**8))
    good = {info.path.stem for info in list_checkpoints(tmp_path, verify=True) if info.is_good}
    assert good >= {"nest", "circle", "huge"}
    assert "bomb" not in good
    torch.save({"state_dict": {"w": torch.tensor([torch.nan]).expand(10**12)}}, tmp_path / "nan.ckpt")
    assert list_checkpoints(tmp_path / "nan.ckpt", verify=True)[0].finite is False


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch exploded",)


def test_code_in_a_file_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"w": torch.ones(1)}, "global_step": Bomb()}, tmp_path / "bomb.ckpt")
    assert last_good_checkpoint(tmp_path) is None
    assert "Python objects" in table(list_checkpoints(tmp_path, verify=True))
    assert not (tmp_path / "exploded").exists()


def test_nothing_there_is_nothing_good(tmp_path: Path) -> None:
    assert last_good_checkpoint(tmp_path) is None
    assert last_good_checkpoint(tmp_path / "nowhere") is None


def order(folder: Path) -> list[str]:
    return [info.path.stem for info in list_checkpoints(folder)]


def test_of_one_run_the_step_counts_before_the_clock(tmp_path: Path) -> None:
    for step, clock in ((4, 100.0), (8, 200.0), (12, 50.0), (16, 60.0)):
        write(tmp_path / f"{step}.ckpt", step, finite=True, run_id="a", start=1, saved_at=clock)
    assert order(tmp_path) == ["4", "8", "12", "16"]
    assert last_good_checkpoint(tmp_path) == tmp_path / "16.ckpt"


def test_a_start_from_an_earlier_step_is_newer_than_what_was_there(tmp_path: Path) -> None:
    for name, start, step, clock in (("x", 1, 8, 300.0), ("y", 2, 6, 20.0), ("z", 1, 4, 100.0)):
        write(tmp_path / f"{name}.ckpt", step, finite=True, run_id="a", start=start, saved_at=clock)
    assert order(tmp_path) == ["z", "x", "y"]


def test_of_several_runs_the_one_that_saved_last_is_the_newest(tmp_path: Path) -> None:
    for name, run, step, clock in (("a8", "a", 8, 100.0), ("b2", "b", 2, 150.0), ("b4", "b", 4, 90.0)):
        write(tmp_path / f"{name}.ckpt", step, finite=True, run_id=run, start=1, saved_at=clock)
    write(tmp_path / "old.ckpt", 99, finite=True, saved_at=120.0)  # an older version's: by its clock
    assert order(tmp_path) == ["a8", "old", "b2", "b4"]


def test_of_two_names_for_one_file_the_one_that_stays_is_given(tmp_path: Path) -> None:
    path = write(tmp_path / "epoch=000.25-step=000001.ckpt", 1)
    os.link(path, tmp_path / "last.ckpt")
    assert last_good_checkpoint(tmp_path) == path


def test_the_finite_check_sees_every_kind_of_tensor() -> None:
    nan, inf = float("nan"), float("inf")
    tensors = {
        "fine": torch.ones(3),
        "large": torch.tensor([3e38, -3e38]),  # its square overflows, it does not
        "nan": torch.tensor([1.0, nan]),
        "inf": torch.tensor([[-inf]]),
        "half": torch.tensor([nan], dtype=torch.float16),
        "bfloat": torch.tensor([inf], dtype=torch.bfloat16),
        "double": torch.tensor([1e300, nan], dtype=torch.float64),
        "large_double": torch.tensor([1e300], dtype=torch.float64),
        "complex": torch.tensor([complex(1, nan)]),
        "sparse": torch.tensor([[0.0, nan]]).to_sparse(),
        "float8": torch.tensor([nan]).to(torch.float8_e4m3fn),
        "view": torch.tensor([[1.0, nan], [1.0, 2.0]]).t()[1],
        "empty": torch.zeros(0),
        "integer": torch.tensor([1]),
        "flag": torch.tensor([True]),
    }
    bad = {"nan", "inf", "half", "bfloat", "double", "complex", "sparse", "float8", "view"}
    assert set(nonfinite_names(tensors.items())) == bad
