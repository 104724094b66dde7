"""Callbacks by name on the command line: ours as typed, and a user's own LightningCLI script."""

import pytest
import yaml

from lightning_stability.plugin import CALLBACKS
from tests.plugin.environments import Environment
from tests.runs import NAMESPACES

pytestmark = pytest.mark.xdist_group("installed")

OWN = """
import sys
import {namespace}, {namespace}.cli, {namespace}.demos.boring_classes
{imports}
boring = {namespace}.demos.boring_classes
for words in {commands!r}:
    sys.argv = ["own.py", *words.split()]
    try:
        {namespace}.cli.LightningCLI(boring.BoringModel, boring.BoringDataModule)
    except SystemExit as end:
        if end.code:
            raise
    print({end!r})
"""
END = "-- end of command --"
OPTIONS = {
    "NaNEarlyStop": ("patience", 3),
    "GradNormMonitor": ("group_depth", 1),
    "FractionalCheckpoint": ("every_n_epochs", 0.5),
    "PrecisionFallback": ("to", "bf16-mixed"),
    "InputCheck": ("max_abs", 5.0),
    "IncidentReport": ("max_incidents", 3),
    "SpikeRecovery": ("max_rewinds", 2),
}


@pytest.fixture
def own(installed, tmp_path):
    """A user's own script; it is given one command after the other."""

    def run(*commands, namespace=NAMESPACES[0], imports="import lightning_stability"):
        script = OWN.format(namespace=namespace, imports=imports, commands=commands, end=END)
        done = installed(script, cwd=tmp_path, automatic="none")
        assert done.returncode == 0, done.stderr
        return done.stdout.split(END)[:-1], done.stderr

    return run


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_script_that_imports_the_package_knows_every_callback_by_name_with_its_options(own, namespace):
    names = [cls.__name__ for cls in CALLBACKS]
    assert OPTIONS.keys() == set(names)
    words = [f"--trainer.callbacks+={name} --trainer.callbacks.{OPTIONS[name][0]}={OPTIONS[name][1]}" for name in names]
    [printed], _ = own(f"fit {' '.join(words)} --print_config", namespace=namespace)
    callbacks = yaml.safe_load(printed)["trainer"]["callbacks"]
    assert [callback["class_path"] for callback in callbacks] == [f"lightning_stability.{name}" for name in names]
    for name, callback in zip(names, callbacks, strict=True):
        option, value = OPTIONS[name]
        assert callback["init_args"][option] == value
        assert [name for name in callback["init_args"] if name.startswith("_")] == []


def test_without_the_import_the_dotted_path_works(own):
    _, said = own(
        "fit --trainer.callbacks+=lightning_stability.NaNEarlyStop --trainer.callbacks.patience=3"
        " --trainer.max_steps=2 --trainer.accelerator=cpu",
        imports="",
    )
    assert "NaNEarlyStop: 2 updates, 0 skipped" in said


def test_the_help_of_every_callback_says_what_each_option_means(own):
    shown, _ = own(*(f"fit --trainer.callbacks.help={cls.__name__}" for cls in CALLBACKS))
    for cls, text in zip(CALLBACKS, shown, strict=True):
        assert cls.__doc__.splitlines()[0].rstrip(".") in text
        options = text.split("Help for")[1].split("  --trainer.callbacks.")[1:]
        assert options
        for option in options:
            meaning = option.replace("\n", " ").split("(type:")[0].split()
            assert len(meaning) > 4, option


def test_a_configuration_file_names_callbacks_and_what_was_run_can_be_run_again(own, tmp_path):
    (tmp_path / "own.yaml").write_text(
        "trainer:\n  max_steps: 2\n  accelerator: cpu\n  callbacks:\n    - class_path: NaNEarlyStop\n"
        "      init_args: {patience: 2, monitor: [val_loss]}\n    - class_path: lightning_stability.GradNormMonitor\n"
    )
    own("fit --config own.yaml")
    [written] = tmp_path.rglob("config.yaml")
    first = yaml.safe_load(written.read_text())["trainer"]["callbacks"]
    assert [callback["class_path"] for callback in first] == [
        "lightning_stability.NaNEarlyStop",
        "lightning_stability.GradNormMonitor",
    ]
    [printed], _ = own(f"fit --config {written} --trainer.logger=false --print_config")
    assert yaml.safe_load(printed)["trainer"]["callbacks"] == first


@pytest.mark.slow
def test_a_word_that_is_not_ours_goes_to_lightning_sdk_whose_command_has_the_same_name(wheel, tmp_path):
    environment = Environment(tmp_path / "env")
    packages = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    for name, text in {
        "lightning_sdk/__init__.py": "import sys\ndef main_cli(): print('SDK', *sys.argv[1:]); sys.exit(3)",
        "lightning_sdk-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: lightning-sdk\nVersion: 1.0\n",
        "lightning_sdk-1.0.dist-info/entry_points.txt": "[console_scripts]\nlightning = lightning_sdk:main_cli\n",
    }.items():
        (packages / name).parent.mkdir(exist_ok=True)
        (packages / name).write_text(text)
    environment.install(wheel)
    done = environment.run("lightning", "login", "--now", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "SDK login --now\n"), done.stderr
    assert "SDK" not in environment.run("lightning", "fit", "--help", cwd=tmp_path).stdout
    done = environment.run("lightning-stability", "login", cwd=tmp_path)
    assert done.returncode == 2
    assert "login" in done.stderr


@pytest.mark.slow
def test_as_typed_in_an_empty_folder_the_probe_trains_with_the_callback(installed, tmp_path):
    done = installed.run("lightning", "fit", "--trainer.callbacks+=NaNEarlyStop", cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "0 skipped" in done.stderr
    assert "as in every Trainer here" not in done.stderr  # the demo's configuration names a GradNormMonitor too
    assert "Best checkpoint:" in done.stdout
