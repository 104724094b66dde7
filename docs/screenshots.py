"""Make the pictures in docs/ again: a real fit, a real TensorBoard, a real headless browser.

usage: python docs/screenshots.py [FOLDER OF A RUN'S LOGS]

Without a folder a small model is trained in fp16 with GradNormMonitor, with a learning rate that grows until
the norm does too. Needs TensorBoard, Chromium with its driver (Debian: `apt-get install chromium
chromium-driver`) and `pip install selenium`.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))


def main() -> None:
    logs = Path(sys.argv[1]) if len(sys.argv) > 1 else train(Path(tempfile.mkdtemp()) / "logs")
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


def train(folder: Path) -> Path:
    """A small classifier in real fp16 on the CPU, whose learning rate grows until the gradients do too."""
    import pytorch_lightning as pl
    import torch
    from pytorch_lightning.loggers import TensorBoardLogger
    from pytorch_lightning.plugins.precision import MixedPrecision
    from torch import nn

    from lightning_stability import GradNormMonitor

    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
            self.decoder = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
            self.head = nn.Linear(32, 2)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.head(self.decoder(self.encoder(x))).float(), y)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
            growth = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1.0, 1.006 ** (step - 300)))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": growth, "interval": "step"}}

    pl.seed_everything(0)
    x = torch.randn(4000, 16)
    labels = (x[:, 0] * x[:, 1] + 0.3 * torch.randn(4000) > 0).long()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=16, shuffle=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", growth_interval=150))],
        max_steps=700,
        max_epochs=-1,
        gradient_clip_val=1.0,
        log_every_n_steps=5,
        logger=TensorBoardLogger(folder),
        callbacks=[GradNormMonitor(group_depth=1)],
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(), loader)
    return folder


def photograph(url: str, picture: Path) -> None:
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
