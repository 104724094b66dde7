"""The main job, and the crash that the project answers, as a user runs them."""

import math
import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_stability.tuab import SyntheticCorpus
from tests import runs
from tests.command import Done, run

SCALES = """
from pytorch_lightning import Callback

class Scales(Callback):
    def on_train_start(self, trainer, module):
        print(f"BATCHES {trainer.num_training_batches}")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            print(f"SCALE {trainer.precision_plugin.scaler.get_scale():g}")
"""


# as many windows as in the recipe, each a quarter as long
SHORT = ("--data.batch_size=4", "--data.window_seconds=2", "--data.stride_seconds=4")


def scalars(folder: Path, tag: str) -> list[float]:
    events = EventAccumulator(str(next(folder.rglob("events.out.*")).parent))
    events.Reload()
    return [scalar.value for scalar in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


def check_demo(done: Done, folder: Path) -> float:
    """Check what the demo says and leaves; return the AUROC per recording."""
    assert done.returncode == 0, done.stderr
    last = done.stdout[done.stdout.index("Test AUROC:") :]
    logs = Path(re.search(r"TensorBoard logs: (.*)", last)[1])
    best = Path(re.search(r"Best checkpoint: +(.*)", last)[1])
    assert list((folder / logs).glob("events.out.*"))
    assert (folder / best).is_file()
    assert "lightning-stability fit --config tuab_crash" in last
    page = folder / re.search(r"A page about this run, to open in a browser: (.*run\.html)$", last.strip())[1]
    assert "Finished: max_epochs=" in page.read_text()
    assert all(map(math.isfinite, scalars(folder, "grad_norm/total")))
    assert len(scalars(folder, "val_loss")) == 3
    assert scalars(folder, "train_loss_epoch")[-1] < scalars(folder, "train_loss_epoch")[0]
    [auroc] = scalars(folder, "test_recording_auroc")
    assert re.search(r"Test AUROC: ([\d.]+) per recording", last)[1] == f"{auroc:.3f}"
    return auroc


def test_the_demo_trains_validates_and_tests_the_probe_and_says_what_to_do_next(command, corpus, tmp_path):
    done = command("demo", f"--data.root={corpus}", "--data.batch_size=4", cwd=tmp_path)
    assert 0 <= check_demo(done, tmp_path) <= 1


@pytest.mark.slow
def test_the_demo_as_typed_writes_a_corpus_and_learns_it(tmp_path):
    assert check_demo(run("demo", cwd=tmp_path), tmp_path) >= 0.85
    assert len(list((tmp_path / "tuab_synthetic").rglob("*.edf"))) == 120


def test_the_crash_recipe_looks_alive_while_every_loss_is_nan_and_dies_at_half_an_epoch(command, cached, tmp_path):
    (tmp_path / "watch.py").write_text(SCALES)
    words = ["--config=tuab_crash", *cached, *SHORT, "--trainer.callbacks+=watch.Scales"]
    done = command("fit", *words, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.rstrip().splitlines()[-1].startswith("ValueError: Input contains NaN: the outputs for ")
    assert re.search(r"Encoder input: mean .* std [45]\.\d+e\+04", done.stderr)
    losses = scalars(tmp_path, "train_loss_step")
    batches = int(re.search(r"BATCHES (\d+)", done.stdout)[1])
    assert len(losses) == (batches // 2) // 4
    assert all(map(math.isnan, losses))
    scales = [float(scale) for scale in re.findall(r"SCALE (\S+)", done.stdout)]
    assert scales == [2.0**15 / 2**step for step in range(len(losses))]
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_stable_recipe_trains_cleanly_on_the_same_corpus(command, cached, tmp_path):
    words = ["--config=tuab_stable", *cached, *SHORT, "--trainer.log_every_n_steps=1"]
    done = command("fit", *words, "--trainer.max_epochs=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(scalars(tmp_path, "val_auroc")) == 4
    assert all(map(math.isfinite, scalars(tmp_path, "train_loss_step") + scalars(tmp_path, "val_loss")))
    assert re.search(r"Encoder input: mean .* std (0\.9|1\.[0-3])", done.stderr)
    assert list(tmp_path.rglob("last.ckpt"))


@pytest.mark.slow
def test_artefacts_in_fp16_crash_in_another_way_finite_steps_first_then_nan_in_the_middle(tmp_path):
    # with this seed there are artefacts in a recording of either split
    SyntheticCorpus(train_subjects=24, eval_subjects=4, seconds=(24, 30), artefacts=2, seed=2).write(
        tmp_path / "corpus"
    )
    words = ["--config=tuab_stable", "--data.root=corpus", "--data.batch_size=4"]
    words += ["--trainer.accumulate_grad_batches=1", "--trainer.log_every_n_steps=1"]  # to see the loss of every batch
    done = run("fit", *words, "--trainer.callbacks=null", "--trainer.precision=16-mixed", cwd=tmp_path)
    finite = [math.isfinite(loss) for loss in scalars(tmp_path, "train_loss_step")]
    first_nan = finite.index(False)
    assert first_nan >= 3
    assert done.returncode == 1
    assert done.stderr.rstrip().splitlines()[-1].startswith("ValueError: Input contains NaN: the outputs for ")
    # in fp32 the same windows are no trouble: it is the format that does not hold these numbers
    done = run("fit", *words, "--trainer.max_epochs=1", "--trainer.default_root_dir=fp32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(map(math.isfinite, scalars(tmp_path / "fp32", "train_loss_step")))


def test_the_crash_recipe_with_nan_early_stop_ends_before_its_validation(command, cached, tmp_path):
    words = ["--config=tuab_crash", *cached, *SHORT, "--trainer.callbacks+=NaNEarlyStop"]
    done = command("fit", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "NaNEarlyStop ended the run: the loss was nan." in done.stderr
    assert "no update was ever applied" in done.stderr
    assert "cast to float16 in module `adapter`" in done.stderr, "where the first non-finite value was made"
    assert not list(tmp_path.rglob("*.ckpt"))
    raised = command("fit", *words, "--trainer.callbacks.action=raise", cwd=tmp_path)
    assert raised.returncode == 1
    assert "Traceback" not in raised.stderr
    assert "NaNEarlyStop ended the run: the loss was nan." in raised.stderr


@pytest.mark.slow
def test_artefacts_with_nan_early_stop_name_the_batch_and_keep_what_the_printed_command_resumes_from(tmp_path):
    SyntheticCorpus(train_subjects=24, eval_subjects=4, seconds=(24, 30), artefacts=2, seed=2).write(
        tmp_path / "corpus"
    )
    words = ["--config=tuab_stable", "--data.root=corpus", "--data.batch_size=4", "--trainer.precision=16-mixed"]
    words += ["--trainer.accumulate_grad_batches=1", "--trainer.callbacks=null", "--trainer.callbacks+=NaNEarlyStop"]
    words += ["--trainer.callbacks.patience=0"]  # the first bad batch ends the run
    stopped = run("fit", *words, cwd=tmp_path)
    assert stopped.returncode == 0, stopped.stderr
    batch = int(re.search(r"where: epoch 0, batch (\d+), global step \1", stopped.stderr)[1])
    kept = re.search(r"last good checkpoint: (\S+)", stopped.stderr)[1]
    state = torch.load(kept, weights_only=False)
    assert state["global_step"] == batch + 1
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values() if value.is_floating_point())
    resumed = run("fit", *words, f"--ckpt_path={kept}", "--trainer.limit_val_batches=0", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "NaNEarlyStop:" in resumed.stderr


@pytest.mark.slow
def test_the_crash_recipe_with_precision_fallback_goes_on_in_fp32_and_names_the_range_of_the_input(corpus, tmp_path):
    words = ["--config=tuab_crash", f"--data.root={corpus}", "--data.batch_size=4", "--trainer.limit_train_batches=8"]
    words += ["--trainer.limit_val_batches=2", "--trainer.callbacks+=PrecisionFallback"]
    done = run("fit", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "cannot continue" in line]
    assert re.search(
        r"16-mixed cannot continue at epoch 0, batch 0, global step 0: the loss was nan; the output of"
        r" `input_stats` ranges from -\d\.\d+e\+05 to \d\.\d+e\+05, and fp16 ends at 65,504\.",
        line,
    )
    losses = scalars(tmp_path, "train_loss_step")
    assert math.isfinite(losses[-1])
    later = scalars(tmp_path, "val_loss") + scalars(tmp_path, "train_loss_epoch")
    assert later
    assert all(map(math.isfinite, later))
    assert scalars(tmp_path, "precision_bits")[0] == 16.0
    assert scalars(tmp_path, "precision_bits")[-1] == 32.0


@pytest.mark.slow
def test_artefacts_with_precision_fallback_cost_no_auroc(tmp_path):
    """At the demo's learning rate, where the small encoder learns something in five epochs."""
    assert run("synthetic", "corpus", "--artefacts=3", "--seed=3", cwd=tmp_path).returncode == 0
    words = ["--config=tuab_stable", "--data.root=corpus", "--model.learning_rate=2e-3"]
    fp16 = ["--trainer.precision=16-mixed", "--trainer.callbacks+=PrecisionFallback"]
    best = []
    for name, more in (("fp32", []), ("fp16", fp16)):
        done = run("fit", *words, *more, f"--trainer.default_root_dir={name}", cwd=tmp_path, timeout=1200)
        assert done.returncode == 0, done.stderr
        metrics = [scalars(tmp_path / name, tag) for tag in ("val_auroc", "val_loss", "train_loss_epoch")]
        assert all(math.isfinite(value) for values in metrics for value in values)
        best.append(max(metrics[0]))
    print(f"AUROC: fp32 {best[0]:.4f}, fp16 with PrecisionFallback {best[1]:.4f}")
    assert best[0] > 0.85
    assert abs(best[1] - best[0]) <= 0.01
    bits = scalars(tmp_path / "fp16", "precision_bits")
    assert bits[0] == 16.0
    assert bits[-1] == 32.0
    events = runs.incidents(next((tmp_path / "fp16").rglob("events.jsonl")).parent)
    [event] = [event for event in events if event["event"] == "precision_changed"]
    assert event["event"] == "precision_changed"
    assert event["step"] > 0, "it is an artefact, not the first batch"
