"""`lightning-stability checkpoints`, and going on from `last_good`, as processes."""

import os
import re
from pathlib import Path

import torch

from tests.command import Launcher

OWN_CLASSES = """
import torch
from pytorch_lightning.demos.boring_classes import BoringDataModule, BoringModel

class Model(BoringModel):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch))

class Data(BoringDataModule):
    pass
"""
WORDS = (
    "fit",
    "--model=own.Model",
    "--data=own.Data",
    "--trainer.limit_train_batches=8",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.callbacks+=lightning_stability.FractionalCheckpoint",
    "--trainer.callbacks.every_n_epochs=0.5",
    "--trainer.callbacks.save_top_k=-1",
)


def test_a_run_is_listed_verified_and_gone_on_from(command: Launcher, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_CLASSES)
    torch.save({"state_dict": {}}, tmp_path / "weights_from_elsewhere.ckpt")  # no run has put it there
    begun = command(*WORDS, "--trainer.max_epochs=1", "--ckpt_path=last_good", cwd=tmp_path)
    assert begun.returncode == 0, begun.stderr
    assert "training starts from the beginning" in begun.stderr
    folder = tmp_path / "lightning_logs" / "version_0" / "checkpoints"

    listed = command("checkpoints", str(folder), "--verify", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert re.search(r"epoch=000\.50-step=000004\.ckpt +4 +0\.50 +\S+ .B .* yes +yes", listed.stdout), listed.stdout
    assert re.search(r"epoch=001\.00-step=000008\.ckpt .* val_loss=", listed.stdout)

    (folder / "zz.ckpt").write_bytes((folder / "last.ckpt").read_bytes()[:-1000])
    listed = command("checkpoints", ".", cwd=tmp_path)
    assert listed.returncode == 1
    assert re.search(r"zz\.ckpt .* NO", listed.stdout)

    went_on = command(*WORDS, "--trainer.max_epochs=2", "--ckpt_path", "last_good", cwd=tmp_path)
    assert went_on.returncode == 0, went_on.stderr
    assert re.search(r"newest complete, finite checkpoint is .*epoch=001\.00-step=000008\.ckpt", went_on.stderr)
    names = [path.name for path in sorted(tmp_path.glob("lightning_logs/version_1/checkpoints/epoch*.ckpt"))]
    assert names == ["epoch=001.50-step=000012.ckpt", "epoch=002.00-step=000016.ckpt"]


def test_foreign_files_and_odd_names_are_a_line_each(command: Launcher, tmp_path: Path) -> None:
    folder = tmp_path / "run\x1b[2J"
    folder.mkdir()
    torch.save({"state_dict": {"w": torch.ones(3)}}, folder / "\x1b[31mred.ckpt")
    os.mkfifo(folder / "pipe.ckpt")
    torch.save({"state_dict": {"w": torch.ones(3)}, "lightning_stability": {"saved_at": "x"}}, folder / "odd.ckpt")
    for words in ([], ["--verify"]):
        listed = command("checkpoints", str(folder), *words, cwd=tmp_path)
        assert listed.returncode == 1, listed.stderr
        assert "\x1b" not in listed.stdout + listed.stderr
        assert "\\x1b[31mred.ckpt" in listed.stdout
        assert re.search(r"pipe\.ckpt .* it is no regular file", listed.stdout)
        assert re.search(r"odd\.ckpt .*saved_at is 'x' \(str\), expected a time", listed.stdout)


def test_a_folder_without_checkpoints_is_one_clear_message(command: Launcher, tmp_path: Path) -> None:
    for words, message in (
        (["checkpoints", "nowhere"], "There is no folder nowhere"),
        (["checkpoints", "."], "There are no checkpoints"),
        (["test", "--config=demo", "--ckpt_path=last_good"], "no complete, finite checkpoint was found"),
    ):
        done = command(*words, cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
