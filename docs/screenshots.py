"""Make the pictures in docs/ again: a real fit, a real TensorBoard, a real headless browser.

usage: python docs/screenshots.py [FOLDER OF A RUN'S LOGS]

Without a folder the demo is run, which takes a minute or two. Needs TensorBoard, Chromium with its driver (Debian:
`apt-get install chromium chromium-driver`) and `pip install selenium`.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))


def main() -> None:
    logs = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else run_demo(Path(tempfile.mkdtemp()))
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
        wait_for(f"{url}/data/plugin/custom_scalars/layout")
        photograph(f"{url}/#custom_scalars&_smoothingWeight=0.6", DOCS / "grad_norm_monitor.png")
    finally:
        board.terminate()
        board.wait()


def run_demo(folder: Path) -> Path:
    """Run the demo in ``folder`` and return where its logs are."""
    subprocess.run([sys.executable, "-m", "lightning_stability", "demo"], cwd=folder, check=True)
    return folder / "lightning_logs"


def photograph(url: str, picture: Path) -> None:
    from PIL import Image
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"):
        options.add_argument(flag)
    for flag in ("--disable-background-networking", "--disable-component-update", "--disable-sync"):
        options.add_argument(flag)
    options.add_argument("--window-size=1500,950")
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
