"""The command line, run as a process in an empty folder."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_stability import __version__
from tests.command import run
from tests.tuab.test_encoder import published_form

OWN_CLASSES = """
import torch
from pytorch_lightning import Callback
from pytorch_lightning.demos.boring_classes import BoringDataModule, BoringModel

class Model(BoringModel):
    def __init__(self, width: int = 3):
        super().__init__()

class Data(BoringDataModule):
    pass

class Precision(Callback):
    def on_train_start(self, trainer, module):
        plugin = trainer.precision_plugin
        print("PRECISION", trainer.precision, type(plugin).__name__, getattr(plugin, "scaler", None) is not None)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with files that are not what they are given for, and classes of the user's own."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "junk.ckpt").write_text("junk")
    (folder / "empty").mkdir()
    (folder / "own.py").write_text(OWN_CLASSES)
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6", "loops": {}}, folder / "other.ckpt")
    torch.save(torch.ones(3), folder / "tensor.ckpt")
    torch.save({"a": 1}, folder / "keys.ckpt")
    partial = published_form(_small_encoder())
    partial["state_dict"].pop("target_encoder.norm.bias")
    torch.save(partial, folder / "partial.ckpt")
    return folder


def _small_encoder():
    from lightning_stability.tuab import EEGPTEncoder

    return EEGPTEncoder(embed_dim=64, depth=2, num_heads=4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("fit --model Nonsense", "unknown class Nonsense: give a path such as my_module.Nonsense"),
        ("fit --model.nonsense=3", "Option 'nonsense' is not accepted"),
        ("fit --nonsense 3", "unrecognized arguments: --nonsense 3"),
        ("fit --trainer.callbacks+=Nonsense", "unknown class Nonsense"),
        (
            "fit --trainer.callbacks+=NaNEarlyStop --trainer.callbacks.patienc=1",
            "Option 'patienc' is not accepted\nSee `lightning-stability fit",
        ),
        ("fit --model.scheduler=step", "Expected a typing.Literal['cosine', 'onecycle']"),
        ("fit --config nonsense", "no file nonsense. Configurations known by name: demo, tuab_crash, tuab_stable"),
        ("fit --data.root=nowhere", "There is no folder nowhere"),
        ("fit --data.root=empty", "empty holds no recordings under edf/train. Expected TUAB's layout"),
        ("fit --model.checkpoint=nowhere.ckpt", "There is no EEGPT checkpoint nowhere.ckpt"),
        ("fit --model.checkpoint=junk.ckpt", "junk.ckpt is not a checkpoint written by torch.save"),
        ("fit --model.checkpoint=partial.ckpt --model.encoder=small", "missing: norm.bias"),
        ("fit --model.input_stats=nowhere.json", "input_stats nowhere.json could not be used"),
        ("test --ckpt_path=nowhere.ckpt", "There is no checkpoint nowhere.ckpt"),
        ("test --ckpt_path=junk.ckpt", "junk.ckpt cannot be loaded as a checkpoint"),
        ("test --ckpt_path=empty", "empty cannot be loaded as a checkpoint"),
        ("test --ckpt_path=tensor.ckpt", "tensor.ckpt is not a checkpoint of a Lightning run"),
        ("test --ckpt_path=keys.ckpt", "keys.ckpt is not a checkpoint of a Lightning run"),
        ("test --ckpt_path=best", "A new process knows no best checkpoint"),
        ("--config tuab_stable fit", "--config tuab_stable belongs behind the subcommand"),
        ("fit --model.dropout=2", "dropout must be at least 0 and below 1, got 2"),
        ("fit --data.cache_dir=junk.ckpt --data.root=full", "edf/train"),
        ("demo --model own.Model", "The demo trains what it trains"),
        ("synthetic new --seed -1", "seed must not be negative, got -1"),
        ("synthetic junk.ckpt/new", "The corpus cannot be written to junk.ckpt/new"),
        (
            "nonsense",
            "there is no command 'nonsense'; expected checkpoints, demo, diagnose, fit, predict, report, status,",
        ),
        ("synthetic empty/../full", "exists already"),
    ],
)
def test_bad_input_gives_one_clear_message_a_non_zero_status_and_no_traceback(command, folder, words, message):
    (folder / "full" / "edf").mkdir(parents=True, exist_ok=True)
    done = command(*words.split(), cwd=folder)
    error = done.stderr[done.stderr.index("lightning-stability: error:") :]
    assert done.returncode == 2
    assert message in error
    assert len(error.splitlines()) <= 6, error
    assert "Traceback" not in done.stderr


def test_a_checkpoint_of_another_model_is_refused(command, folder, cached):
    done = command("test", "--ckpt_path=other.ckpt", *cached, cwd=folder)
    assert done.returncode == 2
    assert "error: the checkpoint is not one of this model" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("missing", ["mne", "edfio", "torchdata"])
def test_without_the_extra_the_message_names_the_line_that_installs_it(command, tmp_path, missing):
    # None in sys.modules makes an import fail as if the package were not there
    script = (
        f"import sys; sys.modules[{missing!r}] = None; from lightning_stability.cli import main; exit(main(['fit']))"
    )
    done = command("-c", script, cwd=tmp_path)
    assert done.returncode == 2
    assert f"The included TUAB trainer needs {missing}" in done.stderr
    assert "pip install 'lightning-stability[tuab]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_any_module_and_data_module_train_by_class_path_without_the_probes_settings(command, folder):
    words = ("fit", "--model", "own.Model", "--data=own.Data", "--trainer.max_steps=2")
    done = command(*words, "--trainer.default_root_dir=of_its_own", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "`max_steps=2` reached" in done.stderr
    assert "EEGPT" not in done.stderr
    config = yaml.safe_load(next((folder / "of_its_own").rglob("config.yaml")).read_text())
    assert config["trainer"]["callbacks"] is None


def test_without_a_logger_nothing_is_written_over_the_users_files_or_in_the_next_runs_way(command, folder):
    (folder / "config.yaml").write_text("# mine\ntrainer:\n  logger: false\n")
    words = ("fit", "--model=own.Model", "--trainer.max_steps=1", "--config=config.yaml")
    assert [command(*words, cwd=folder).returncode for _ in range(2)] == [0, 0]
    assert (folder / "config.yaml").read_text().startswith("# mine")


def test_a_checkpoint_brings_its_options_and_the_command_line_goes_before_them(command, cached, tmp_path):
    fit = ("fit", *cached, "--trainer.limit_val_batches=2")
    done = command(*fit, "--data.window_seconds=4", "--model.hidden=5", "--trainer.max_steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    last = next(tmp_path.rglob("last.ckpt"))
    done = command("test", f"--ckpt_path={last}", *cached, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "was not trained" not in done.stderr
    done = command(*fit, f"--ckpt_path={last}", "--model.learning_rate=1e-5", "--trainer.max_steps=4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(max(tmp_path.rglob("config.yaml"), key=lambda path: path.stat().st_mtime).read_text())
    assert config["data"]["init_args"]["window_seconds"] == 4.0
    assert (config["model"]["init_args"]["hidden"], config["model"]["init_args"]["learning_rate"]) == (5, 1e-5)


def test_scores_of_a_model_that_was_not_trained_are_called_so(command, cached, tmp_path):
    done = command("validate", *cached, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "No --ckpt_path was given: `validate` looks at a model that was not trained" in done.stderr


@pytest.mark.slow
def test_two_processes_fit_and_predict_as_one_does(corpus, tmp_path):
    two = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", f"--data.root={corpus}"]
    done = run("fit", *two, "--trainer.max_steps=2", cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Best checkpoint:") == 1
    last = f"--ckpt_path={next(tmp_path.rglob('last.ckpt'))}"
    tables = []
    for words in (two, [f"--data.root={corpus}"]):
        done = run("predict", *words, last, "--trainer.default_root_dir=predict", cwd=tmp_path, timeout=200)
        assert done.returncode == 0, done.stderr
        table = max((tmp_path / "predict").rglob("predictions.csv"), key=lambda path: path.stat().st_mtime)
        tables.append([line.split(",") for line in table.read_text().splitlines()[1:]])
    assert [path for path, _ in tables[0]] == [path for path, _ in tables[1]]
    # the sampler fills the last batch up with windows that another process has seen too
    for (_, several), (_, one) in zip(*tables, strict=True):
        assert float(several) == pytest.approx(float(one), abs=0.02)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trainer.precision=16-mixed"], "PRECISION 16-mixed MixedPrecision True"),
        (["--trainer.precision=16-mixed", "--trainer.accelerator=cpu"], "PRECISION 16-mixed MixedPrecision True"),
        (["--trainer.precision=bf16-mixed"], "PRECISION bf16-mixed MixedPrecision False"),
        ([], "PRECISION 32-true Precision False"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at what a CPU does")
def test_fp16_is_real_on_a_cpu_and_nothing_else_is_changed(command, folder, options, said):
    own = ("--model=own.Model", "--trainer.callbacks+=own.Precision", "--trainer.max_steps=1")
    done = command("fit", *own, *options, cwd=folder)
    assert said in done.stdout, done.stderr
    assert ("real fp16 with a gradient scaler" in done.stderr) == ("--trainer.precision=16-mixed" in options)


def test_with_nothing_named_the_probe_is_what_trains(command, folder):
    done = command("fit", "--print_config", cwd=folder)
    config = yaml.safe_load(done.stdout)
    assert config["model"]["class_path"] == "lightning_stability.tuab.EEGPTProbe"
    assert config["data"]["class_path"] == "lightning_stability.tuab.TUABDataModule"
    assert config["trainer"]["max_epochs"] < 10


@pytest.mark.parametrize("by_path", [False, True])
def test_configurations_are_known_by_name_and_by_path(command, folder, by_path):
    name = "tuab_stable"
    if by_path:
        from lightning_stability.tuab.configs import packaged_file

        shutil.copy(packaged_file("tuab_stable"), folder / "copy.yaml")
        name = "copy.yaml"
    config = yaml.safe_load(command("fit", "--config", name, "--print_config", cwd=folder).stdout)
    assert config["trainer"]["accumulate_grad_batches"] == 2
    assert config["trainer"]["precision"] == "32-true"
    assert config["model"]["init_args"]["learning_rate"] == 2e-4
    assert config["model"]["init_args"]["scheduler"] == "cosine"


def test_callbacks_are_known_by_their_short_names_with_their_options(command, folder):
    done = command(
        "fit", "--trainer.callbacks+=GradNormMonitor", "--trainer.callbacks.group_depth=1", "--print_config", cwd=folder
    )
    config = yaml.safe_load(done.stdout)["trainer"]["callbacks"][-1]
    assert config["class_path"].endswith("GradNormMonitor")
    assert config["init_args"]["group_depth"] == 1


def test_a_callback_named_on_the_command_line_takes_the_place_of_the_recipes_own(command, folder):
    (folder / "mine.py").write_text(
        "from lightning_stability import NaNEarlyStop\n"
        "from pytorch_lightning.demos.boring_classes import BoringModel\n"
        "class Model(BoringModel):\n"
        "    def on_fit_start(self):\n"
        "        print('PATIENCE', [c.patience for c in self.trainer.callbacks if isinstance(c, NaNEarlyStop)])\n"
    )
    (folder / "mine.yaml").write_text(
        "trainer: {max_steps: 1, callbacks: [{class_path: NaNEarlyStop, init_args: {patience: 2}}]}\n"
        "model: mine.Model\ndata: pytorch_lightning.demos.boring_classes.BoringDataModule\n"
    )
    words = ["--trainer.callbacks+=NaNEarlyStop", "--trainer.callbacks.patience=5"]
    words += ["--trainer.default_root_dir=replaced"]
    done = command("fit", "--config=mine.yaml", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "PATIENCE [5]" in done.stdout
    [saved] = (folder / "replaced").rglob("config.yaml")
    callbacks = yaml.safe_load(saved.read_text())["trainer"]["callbacks"]
    assert [callback["init_args"]["patience"] for callback in callbacks] == [5]


def test_the_windows_length_is_given_once(command, folder):
    done = command("fit", "--data.window_seconds=4", "--print_config", cwd=folder)
    assert yaml.safe_load(done.stdout)["data"]["init_args"]["window_seconds"] == 4.0
    assert "window_seconds" not in yaml.safe_load(done.stdout)["model"]["init_args"]


def test_help_names_every_command_and_configuration(command, folder):
    done = command("--help", cwd=folder)
    assert done.returncode == 0
    for word in ("fit", "validate", "test", "predict", "demo", "synthetic", "tuab_crash", "tuab_stable"):
        assert word in done.stdout


def test_the_command_says_its_version(tmp_path):
    words = [sys.executable, "-m", "lightning_stability", "--version"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == f"lightning-stability {__version__}\n"


def test_both_commands_are_installed_with_the_package():
    for name in ("lightning-stability", "lightning"):
        command = Path(sys.executable).parent / name
        assert "from lightning_stability.__main__ import main" in command.read_text()


@pytest.mark.parametrize("size", ["small", pytest.param("large", marks=pytest.mark.slow)])
def test_fit_validate_test_and_predict_work_with_an_eegpt_checkpoint(command, cached, tmp_path, size):
    """The commands of the README for the real corpus and the real weights, on files of their form."""
    from lightning_stability.tuab import EEGPTEncoder

    encoder = _small_encoder() if size == "small" else EEGPTEncoder()
    torch.save(published_form(encoder), tmp_path / "eegpt.ckpt")
    real = ["--config=tuab_stable", *cached, "--model.checkpoint=eegpt.ckpt"]
    real += ["--model.encoder=small"] if size == "small" else []
    short = ["--data.window_seconds=1", "--data.stride_seconds=8", "--data.batch_size=2"]
    limits = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    done = command(
        "fit", *real, *short, *limits, "--trainer.limit_val_batches=2", "--trainer.val_check_interval=1.0", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "no EEGPT" not in done.stderr
    best = next(line.split()[2] for line in done.stdout.splitlines() if line.startswith("Best checkpoint:"))
    evaluation = [f"--ckpt_path={best}", *real, *short]
    limit = {"validate": "val", "test": "test", "predict": "predict"}
    for subcommand, split in limit.items():
        done = command(subcommand, *evaluation, f"--trainer.limit_{split}_batches=2", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert next(tmp_path.rglob("predictions.csv")).read_text().startswith("recording,abnormal_probability\nedf/eval/")
