"""Make the pictures in docs/ again: a real fit, a real TensorBoard, a real headless browser.

usage: python docs/screenshots.py PICTURE [FOLDER OF A RUN'S LOGS]

PICTURE is grad_norm_monitor (the demo's run) or precision_fallback_tensorboard (in fp16, on recordings with artefacts).
Without a folder the run is made, which takes a few minutes. Needs TensorBoard, Chromium with its driver (Debian:
`apt-get install chromium chromium-driver`) and `pip install selenium`.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))


@dataclass(frozen=True)
class Picture:
    """A page of TensorBoard."""

    commands: tuple[str, ...]
    """What makes the run."""
    page: str
    """Where to look."""
    data: str
    """What TensorBoard answers once it has read the run."""
    size: str
    """Of the window."""


PICTURES = {
    "grad_norm_monitor": Picture(
        ("demo",), "#custom_scalars&_smoothingWeight=0.6", "custom_scalars/layout", "1500,950"
    ),
    "precision_fallback_tensorboard": Picture(
        (
            "synthetic tuab_artefacts --artefacts 3 --seed 3",
            "fit --config tuab_stable --trainer.precision=16-mixed --data.root=tuab_artefacts --data.batch_size=8"
            " --trainer.max_epochs=1 --trainer.log_every_n_steps=1 --model.learning_rate=2e-3",
        ),
        "#scalars&_smoothingWeight=0&tagFilter=precision_bits%7Closs_scale%7Ctrain_loss_step",
        "scalars/tags",
        "1500,612",
    ),
}


def main() -> None:
    name = sys.argv[1]
    picture = PICTURES[name]
    logs = Path(sys.argv[2]).resolve() if len(sys.argv) > 2 else train(picture, Path(tempfile.mkdtemp()))
    port = free_port()
    board = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tensorboard.main",
            "--logdir",
            logs.name,
            "--port",
            str(port),
            "--load_fast=false",
        ],
        cwd=logs.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://localhost:{port}"
        wait_for(f"{url}/data/plugin/{picture.data}")
        photograph(f"{url}/{picture.page}", DOCS / f"{name}.png", picture.size)
    finally:
        board.terminate()
        board.wait()


def train(picture: Picture, folder: Path) -> Path:
    """Make a picture's run in ``folder`` and return where its logs are."""
    for command in picture.commands:
        subprocess.run([sys.executable, "-m", "lightning_stability", *command.split()], cwd=folder, check=True)
    return folder / "lightning_logs"


def photograph(url: str, picture: Path, size: str) -> None:
    from PIL import Image
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"):
        options.add_argument(flag)
    for flag in ("--disable-background-networking", "--disable-component-update", "--disable-sync"):
        options.add_argument(flag)
    options.add_argument(f"--window-size={size}")
    options.binary_location = "/usr/bin/chromium"
    browser = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        browser.get(url)
        time.sleep(12)  # TensorBoard draws its charts when its own requests have come back
        browser.save_screenshot(str(picture))
        Image.open(picture).quantize(128).save(picture, optimize=True)
    finally:
        browser.quit()


def wait_for(url: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url) as answer:
                if answer.read() not in (b"", b"{}"):
                    return
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise TimeoutError(f"TensorBoard did not answer at {url} within {seconds:.0f} s.")
        time.sleep(0.5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
