"""On a GPU, where the backward pass runs in a thread of its own: the same origins; its incidents replayed on a CPU."""

from __future__ import annotations

import time
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_stability import IncidentReport, NaNEarlyStop
from lightning_stability.diagnosis import RecordedStep, diagnose, find_origin
from lightning_stability.diagnosis.step import capture_state
from lightning_stability.recovery.random_state import RandomState
from tests.diagnosis import augmented
from tests.diagnosis.test_origin import CASES, Net, line_of
from tests.zoo.program import Module

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MAKE_CPU_TENSORS = {
    "torchs_own_attention_with_all_keys_masked",
    "a_slice_that_is_written_in_place",
    "a_target_that_is_masked",
    "an_overflow_behind_a_mask",
    "a_mask_that_is_multiplied_with_infinity",
    "a_sparse_gradient",
    "a_sparse_product",
}


@pytest.mark.parametrize(
    ("function", "phase", "op", "module", "precision", "failed"),
    [case for case in CASES if case.id not in MAKE_CPU_TENSORS],
)
def test_the_origin_is_the_same(function, phase, op, module, precision, failed):
    torch.manual_seed(0)
    net, batch = Net(function).cuda(), torch.rand(3, 4, device="cuda")
    origin = find_origin(RecordedStep(net, [batch], [RandomState.capture()], precision=precision))
    assert origin is not None
    assert (origin.phase, origin.module, origin.line) == (phase, module, line_of(function))


def test_the_same_bits_on_the_gpu_and_the_same_verdict_on_a_cpu(tmp_path, monkeypatch):
    torch.manual_seed(0)
    program = augmented.program(0)
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        callbacks=[IncidentReport(tmp_path), NaNEarlyStop(patience=0)],
        **program.options,
    )
    trainer.fit(program.module, program.data)
    [incident] = (tmp_path / "incidents").iterdir()
    report = diagnose(incident)
    assert (report["reproduced"], report["exact"]) == (True, True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = diagnose(incident)
    assert report["reproduced"] is True
    assert any("device: cuda recorded, cpu here" in note for note in report["notes"])


class Block(nn.Module):
    def __init__(self, width: int, bad: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.bad = bad

    def forward(self, x: Any) -> Any:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(batch, length, 3, 12, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        hidden = self.mlp(self.norms[1](x))
        return x + (hidden * 0).log() if self.bad else x + hidden  # here


class GPT(Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50304, 768)
        self.blocks = nn.ModuleList(Block(768, bad=place == 7) for place in range(12))
        self.head = nn.Linear(768, 50304, bias=False)
        self.head.weight = self.embedding.weight

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = self.embedding(batch)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def test_a_transformer_of_124_million_parameters():
    module = GPT().cuda()
    optimizer = module.configure_optimizers()
    batch = torch.randint(50304, (8, 1024), device="cuda")
    state = capture_state(module, [optimizer])
    step = RecordedStep(module, [batch], [RandomState.capture()], precision="bf16-mixed", state=state)
    step.optimizers = [optimizer]
    seconds = []
    for _ in range(2):
        torch.cuda.synchronize()
        began = time.monotonic()
        origin = find_origin(step)
        torch.cuda.synchronize()
        seconds.append(time.monotonic() - began)
    before = torch.cuda.memory_allocated()
    print(
        f"\nfound in {seconds} s; peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, of it {before / 2**30:.1f}"
    )
    assert (origin.module, origin.op) == ("blocks.7", "log")
    for block in module.blocks:
        block.bad = False
    began = time.monotonic()
    assert find_origin(step) is None
    print(f"a whole healthy step in {time.monotonic() - began} s")
