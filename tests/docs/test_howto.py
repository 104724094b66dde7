"""What the how-to pages promise beyond their blocks: a requeued job, and two machines that torchrun starts."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_stability.events import read_events
from tests.docs.blocks import ROOT, blocks_of, commands_of, files_of
from tests.docs.commands import VARIABLE

# SLURM's own programs: `srun` runs the training, `scontrol requeue` ends it, as SLURM does.
STUBS = {
    "srun": 'echo $$ > task\nexec "$@"',
    "scontrol": 'echo "$@" >> requeued\nkill -KILL "$(cat task)"',
}
VARIABLES = {
    **{"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"},
    **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1"},
}
MINUTES = 10 * 60


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", VARIABLE: "none", **more}


def save_files(page: str, folder: Path) -> None:
    for name, text in files_of(page).items():
        (folder / name).write_text(text)


@pytest.mark.slow
def test_the_slurm_job_is_requeued_before_its_time_limit_and_resumes(tmp_path):
    save_files("docs/howto/slurm.md", tmp_path)
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = environment(PATH=path, **VARIABLES)
    job = ["bash", "train.sbatch"]

    first = subprocess.Popen(job, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + MINUTES
    while not list(tmp_path.glob("checkpoints/*.ckpt")) and time.monotonic() < end:
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGUSR1)
    first.wait(MINUTES)
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"

    done = subprocess.run(job, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=MINUTES)
    assert done.returncode == 0, done.stdout + done.stderr
    [log] = (tmp_path / "lightning_logs").iterdir()
    assert log.name == "version_17"
    events = list(read_events(log))
    starts = [event for event in events if event["event"] == "training_started"]
    assert [bool(start["resumed_from"]) for start in starts] == [False, True]
    assert starts[1]["step"] > 0
    assert [event["status"] for event in events if event["event"] == "training_ended"] == ["finished"]
    assert "resume_differs" not in {event["event"] for event in events}


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1], ids=["ddp", "fsdp2"])
def test_torchrun_starts_the_training_on_two_nodes(number, tmp_path):
    page = "docs/howto/two_nodes.md"
    save_files(page, tmp_path)
    words = commands_of(blocks_of(page, "console")[0])[number].words
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        here = f"--rdzv-endpoint=127.0.0.1:{probe.getsockname()[1]}"
    line = [re.sub(r"^--nproc-per-node=8$", "--nproc-per-node=1", word) for word in words[1:]]
    line = [here if word.startswith("--rdzv-endpoint=") else word for word in line]
    program = [sys.executable, "-m", "torch.distributed.run", "--local-addr=127.0.0.1", *line]
    env = environment(GLOO_SOCKET_IFNAME="lo")
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    nodes = [subprocess.Popen(program, cwd=tmp_path, env=env, **pipes) for _ in range(2)]
    try:
        said = [node.communicate(timeout=MINUTES)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    assert "NaNEarlyStop: 31 updates, 1 skipped" in "".join(said)
    assert list(tmp_path.rglob("*.ckpt"))
