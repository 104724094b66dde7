"""The logged norms against float64 norms of gradients copied by hand, in every way a model can be trained."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_stability import GradNormMonitor
from tests import runs


def fit_and_compare(
    pl: Any,
    module: Any,
    tolerance: float = 1e-4,
    depth: int = 2,
    loader: Any = None,
    monitor: Any = None,
    **options: Any,
) -> list[dict[str, float]]:
    """Train, and hold every logged norm of every step against the copies. Returns the logged rows."""
    logger = runs.memory_logger(pl)
    monitor = monitor or GradNormMonitor(group_depth=depth)
    trainer = runs.trainer(pl, logger=logger, callbacks=[monitor, *options.pop("callbacks", [])], **options)
    trainer.fit(module, loader or runs.data())
    rows = [row for _, row in logger.rows]
    assert len(rows) == len(module.copies) > 0
    several = len(trainer.optimizers) > 1
    for row, copies, optimizer in zip(rows, module.copies, module.copied_optimizers, strict=True):
        prefix = f"grad_norm/optimizer_{optimizer}/" if several else "grad_norm/"
        expected = {prefix + name: norm for name, norm in runs.reference_norms(copies, depth).items()}
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=tolerance, abs=1e-30), key
        own = {prefix + name for name in ("total_max", "clip_coefficient", "nonfinite_steps")}
        zero = {key for key, value in row.items() if key.startswith(prefix) and value == 0.0}
        assert {key for key in row if key.startswith("grad_norm/")} - own - zero == set(expected) - zero
    return rows


def test_32_true(pl: Any) -> None:
    fit_and_compare(pl, runs.make_module(pl))


def test_64_true(pl: Any) -> None:
    fit_and_compare(pl, runs.make_module(pl), precision="64-true", tolerance=1e-12)


def test_bf16_mixed(pl: Any) -> None:
    fit_and_compare(pl, runs.make_module(pl), precision="bf16-mixed")


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_16_bit_gradients(pl: Any, precision: str) -> None:
    module = runs.make_module(pl, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=1e-3))
    fit_and_compare(pl, module, precision=precision, tolerance=1e-3)


def test_16_true_norm_beyond_what_fp16_can_hold(pl: Any) -> None:
    """Each element fits fp16 while their norm, 65504 and up, does not."""

    def training_step(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        return sum((p.float() * 30000.0).sum() for p in self.parameters())

    module = runs.make_module(
        pl, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.0), training_step=training_step
    )
    rows = fit_and_compare(pl, module, precision="16-true", tolerance=1e-3)
    assert rows[0]["grad_norm/total"] > 65504


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_16_mixed_with_grad_scaler(pl: Any, fused: bool, accumulate: int) -> None:
    module = runs.make_module(pl, optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, fused=fused))
    plugins = runs.fp16(pl, init_scale=1024.0)
    rows = fit_and_compare(pl, module, plugins=plugins, accumulate_grad_batches=accumulate)
    assert all(row["loss_scale"] == 1024.0 for row in rows)


@pytest.mark.parametrize("fused", [False, True])
def test_16_mixed_overflow_is_counted_and_left_out(pl: Any, fused: bool) -> None:
    module = runs.make_module(pl, optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, fused=fused))
    logger = runs.memory_logger(pl)
    trainer = runs.trainer(
        pl,
        logger=logger,
        callbacks=[GradNormMonitor()],
        plugins=runs.fp16(pl, init_scale=2.0**40),
        max_epochs=8,
    )
    trainer.fit(module, runs.data())
    rows = [row for _, row in logger.rows]
    references = [runs.reference_norms(copies, 2)["total"] for copies in module.copies]
    finite = [torch.isfinite(torch.tensor(total)).item() for total in references]
    assert (finite[0], finite[-1]) == (False, True), "the scale must start too high and come down"
    for row, total, is_finite in zip(rows, references, finite, strict=True):
        assert ("grad_norm/total" in row) == is_finite
        if is_finite:
            assert row["grad_norm/total"] == pytest.approx(total, rel=1e-4)
        assert all(torch.isfinite(torch.tensor(value)) for value in row.values())
    assert rows[-1]["grad_norm/nonfinite_steps"] == finite.count(False)
    assert rows[0]["loss_scale"] == 2.0**40


def test_accumulation(pl: Any) -> None:
    rows = fit_and_compare(pl, runs.make_module(pl), accumulate_grad_batches=3, loader=runs.data(14))
    assert len(rows) == 3  # 7 batches: 3 + 3 + 1


def test_several_parameter_groups(pl: Any) -> None:
    def optimizer(module: Any) -> Any:
        groups = [
            {"params": module.net.head.parameters(), "lr": 0.1},
            {"params": module.net.encoder.parameters(), "lr": 0.01},
        ]
        return torch.optim.SGD(groups, lr=1.0)

    fit_and_compare(pl, runs.make_module(pl, optimizer=optimizer), depth=3)


class Odd(nn.Module):
    """Frozen, unused, tied, sparse and complex parameters, and one on the root."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.first = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.unused = nn.Linear(6, 6)
        self.embedding = nn.Embedding(10, 6, sparse=True)
        self.filter = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.embedding(torch.tensor([1, 3, 3, 7]))  # a row that occurs twice
        spectrum = torch.fft.rfft(self.frozen(self.tied(self.first(x * self.scale)))) * self.filter
        return torch.fft.irfft(spectrum) + rows.sum(0)


def test_frozen_unused_tied_sparse_and_complex(pl: Any) -> None:
    torch.manual_seed(0)
    module = runs.make_module(pl, Odd(), optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=1e-3))
    rows = fit_and_compare(pl, module)
    assert "grad_norm/net.tied" in rows[0], "its bias"
    assert rows[0]["grad_norm/net.embedding"] > 0
    assert rows[0].get("grad_norm/net.unused", 0.0) == 0.0


def test_sparse_gradients_with_clipping(pl: Any) -> None:
    """Lightning alone cannot clip sparse gradients; the measured norm can."""
    torch.manual_seed(0)
    module = runs.make_module(pl, Odd(), optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=1.0))
    before = module.net.embedding.weight.detach().clone()
    rows = fit_and_compare(pl, module, gradient_clip_val=1e-3, max_steps=1)
    expected = module.copies[0]["net.embedding.weight"] * rows[0]["grad_norm/clip_coefficient"]
    torch.testing.assert_close(before - module.net.embedding.weight, expected.float(), rtol=1e-3, atol=1e-7)


def test_large_tensors(pl: Any) -> None:
    """Torch's CPU norm of one such gradient alone is off by more than 1e-4."""
    weight = nn.Parameter(torch.zeros(3_000_001))

    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.weight * 0.01).sum() + x.mean()

    module = runs.make_module(
        pl,
        Large(),
        optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=1e-3),
        training_step=lambda self, batch, batch_idx: self.net(batch[0]),
    )
    fit_and_compare(pl, module, max_steps=1)
    alone = torch.linalg.vector_norm(module.copies[0]["net.weight"].float())
    exact = runs.reference_norms(module.copies[0], 2)["total"]
    assert abs(float(alone) - exact) / exact > 1e-4, "then this test needs a larger tensor"


def test_manual_optimization_with_two_optimizers(pl: Any) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.manual_backward(self.net(batch[0]).pow(2).mean())
        first.step()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward((self.net(batch[0]) - 1).pow(2).mean())
        second.step()
        second.zero_grad()

    def optimizers(module: Any) -> Any:
        return (
            torch.optim.Adam(module.net.encoder.parameters(), lr=1e-3),
            torch.optim.SGD(module.net.head.parameters(), lr=1e-3),
        )

    module = runs.make_module(pl, optimizer=optimizers, training_step=training_step)
    module.automatic_optimization = False
    rows = fit_and_compare(pl, module)
    assert "grad_norm/optimizer_0/net.encoder" in rows[0]
    assert "grad_norm/optimizer_1/net.head" in rows[1]


def test_freezing_and_unfreezing_in_the_middle(pl: Any) -> None:
    def on_train_epoch_start(self: Any) -> None:
        epoch = self.trainer.current_epoch
        self.net.encoder.requires_grad_(epoch != 1)
        if epoch == 3:  # as BaseFinetuning does when it unfreezes
            self.extra = nn.Parameter(torch.ones(6))
            self.trainer.optimizers[0].add_param_group({"params": [self.extra]})

    def training_step(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch[0] * getattr(self, "extra", 1.0)).pow(2).mean()

    module = runs.make_module(pl, on_train_epoch_start=on_train_epoch_start, training_step=training_step)
    rows = fit_and_compare(pl, module, max_epochs=5)
    assert rows[4]["grad_norm/net.encoder"] == 0.0
    assert rows[8]["grad_norm/net.encoder"] > 0.0
    assert rows[12]["grad_norm/extra"] > 0.0


def test_torch_compile(pl: Any) -> None:
    net = torch.compile(runs.Net(), backend="aot_eager")
    rows = fit_and_compare(pl, runs.make_module(pl, net))
    assert "grad_norm/net.encoder" in rows[0], "not `_orig_mod`"


def test_compiled_module(pl: Any) -> None:
    module = runs.make_module(pl)
    logger = runs.memory_logger(pl)
    trainer = runs.trainer(pl, logger=logger, callbacks=[GradNormMonitor()], max_steps=2)
    trainer.fit(torch.compile(module, backend="eager"), runs.data())
    reference = runs.reference_norms(module.copies[0], 2)
    assert logger.rows[0][1]["grad_norm/total"] == pytest.approx(reference["total"], rel=1e-4)


def test_no_gradients_at_all(pl: Any) -> None:
    module = runs.make_module(pl, training_step=lambda self, batch, batch_idx: None)
    logger = runs.memory_logger(pl)
    runs.trainer(pl, logger=logger, callbacks=[GradNormMonitor()]).fit(module, runs.data())
    assert [row["grad_norm/total"] for _, row in logger.rows] == [0.0] * 4


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.LBFGS])
def test_other_optimizers(pl: Any, optimizer_class: Any) -> None:
    module = runs.make_module(pl, optimizer=lambda m: optimizer_class(m.parameters(), lr=1e-3))
    logger = runs.memory_logger(pl)
    trainer = runs.trainer(pl, logger=logger, callbacks=[GradNormMonitor()])
    trainer.fit(module, runs.data())
    assert len(logger.rows) == 4
    if optimizer_class is not torch.optim.LBFGS:  # it looks at several gradients in a step
        references = [runs.reference_norms(copies, 2)["total"] for copies in module.copies]
        assert [row["grad_norm/total"] for _, row in logger.rows] == pytest.approx(references, rel=1e-4)


def test_gradients_changed_by_hooks_before_clipping(pl: Any) -> None:
    """A module's own hook runs after every callback's; the norm is of what it left."""

    def on_before_optimizer_step(self: Any, optimizer: Any) -> None:
        for parameter in self.parameters():
            parameter.grad.mul_(3.0)
        runs.copy_gradients(self, optimizer)

    fit_and_compare(pl, runs.make_module(pl, on_before_optimizer_step=on_before_optimizer_step), gradient_clip_val=0.1)
