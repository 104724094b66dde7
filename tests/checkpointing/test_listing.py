"""Which checkpoints are good, and which is the newest of those."""

import os
from pathlib import Path

import torch

from lightning_stability.checkpointing import last_good_checkpoint, list_checkpoints
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


def test_verify_finds_a_flipped_bit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ckpt", 1)
    content = bytearray(path.read_bytes())
    place = content.find(torch.ones(4).numpy().tobytes())
    content[place + 1] ^= 1
    path.write_bytes(content)
    assert list_checkpoints(tmp_path)[0].complete
    assert not list_checkpoints(tmp_path, verify=True)[0].complete


def test_what_was_found_before_the_write_is_believed_until_asked_to_verify(tmp_path: Path) -> None:
    write(tmp_path / "a.ckpt", 1, weight=float("nan"), finite=True, epochs=0.25, saved_at=5.0, metrics={"loss": 0.5})
    [info] = list_checkpoints(tmp_path)
    assert (info.finite, info.epochs, info.saved, info.metrics) == (True, 0.25, 5.0, {"loss": 0.5})
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
    usable = {
        "tensor": {"state_dict": torch.ones(2)},
        "section": {"state_dict": {"w": torch.ones(2)}, "lightning_stability": "mine", "global_step": 3},
        "step": {"state_dict": {"w": torch.ones(2)}, "global_step": "3", "epoch": "one"},
        "averaged": {
            **torch.load(good),
            "current_model_state": {"mask": torch.tensor([-float("inf"), 0.5])},
        },
    }
    for name, checkpoint in usable.items():
        torch.save(checkpoint, tmp_path / f"{name}.ckpt")
    torch.save(usable["step"], tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    for verify in (False, True):
        infos = list_checkpoints(tmp_path, verify)
        complete = {info.path.stem for info in infos if info.complete}
        assert complete == {"good", *usable}
        assert len(infos) == 11
        assert "Python objects" in table(infos)
        assert "cut short" in table(infos)
    assert all(info.finite for info in infos if info.path.stem in {"good", *usable})


def test_nothing_there_is_nothing_good(tmp_path: Path) -> None:
    assert last_good_checkpoint(tmp_path) is None
    assert last_good_checkpoint(tmp_path / "nowhere") is None


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
