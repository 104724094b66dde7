"""What the monitor does to clipping by norm, which its pass drives: nothing."""

from typing import Any

import pytest
import torch

from lightning_stability import GradNormMonitor
from tests import runs


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "unused parameters"])
def test_clipping_gives_the_same_bits_as_without_the_monitor(pl: Any, precision: str) -> None:
    weights = []
    for callbacks in ([], [GradNormMonitor()]):
        net = runs.Net()
        if precision == "unused parameters":
            net.encoder.unused = torch.nn.Linear(3, 3)
            net.encoder.forward = lambda x, parts=list(net.encoder)[:-1]: torch.nn.Sequential(*parts)(x)
        module = runs.make_module(pl, net, optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2))
        torch.manual_seed(3)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        plugins = runs.fp16(pl, init_scale=1024.0) if precision == "16-mixed" else None
        trainer = runs.trainer(
            pl,
            logger=runs.memory_logger(pl),
            callbacks=callbacks,
            plugins=plugins,
            gradient_clip_val=0.05,
            max_epochs=3,
        )
        trainer.fit(module, runs.data())
        weights.append(torch.nn.utils.parameters_to_vector(module.parameters()).detach())
    assert torch.equal(*weights)


def test_the_logged_coefficient_was_applied(pl: Any) -> None:
    clipped = []

    def optimizer_step(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        optimizer.step(closure=closure)
        clipped.append(torch.cat([p.grad.flatten() for p in self.parameters()]).norm().item())

    module = runs.make_module(pl, optimizer_step=optimizer_step)
    logger = runs.memory_logger(pl)
    trainer = runs.trainer(pl, logger=logger, callbacks=[GradNormMonitor()], gradient_clip_val=0.05)
    trainer.fit(module, runs.data())
    for (_, row), norm in zip(logger.rows, clipped, strict=True):
        assert row["grad_norm/clip_coefficient"] < 1.0
        assert row["grad_norm/total"] * row["grad_norm/clip_coefficient"] == pytest.approx(norm, rel=1e-4)


def test_clipping_is_one_pass_and_not_two(pl: Any) -> None:
    calls = {"clip": 0, "norm": 0}

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls["norm"] += func.overloadpacket is torch.ops.aten._foreach_norm
            return func(*args, **(kwargs or {}))

    module = runs.make_module(pl)
    options = {"logger": runs.memory_logger(pl), "gradient_clip_val": 0.05}
    trainer = runs.trainer(pl, callbacks=[GradNormMonitor(), runs.RecordCallback()], **options)
    with Count():
        trainer.fit(module, runs.data())
    assert calls["norm"] == len(module.copies) == 4


def test_clipping_is_left_to_a_module_that_clips_itself(pl: Any) -> None:
    def configure_gradient_clipping(self: Any, optimizer: Any, **options: Any) -> None:
        self.net.head.weight.grad.mul_(100.0)  # the measured norm is no longer the gradient's
        self.clip_gradients(optimizer, **options)
        total = torch.cat([p.grad.flatten() for p in self.parameters()]).norm()
        assert float(total) == pytest.approx(0.05, rel=1e-3)

    def signature(
        self: Any, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        configure_gradient_clipping(
            self,
            optimizer,
            gradient_clip_val=gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm,
        )

    module = runs.make_module(pl, configure_gradient_clipping=signature)
    logger = runs.memory_logger(pl)
    trainer = runs.trainer(pl, logger=logger, callbacks=[GradNormMonitor()], gradient_clip_val=0.05)
    trainer.fit(module, runs.data())
    for (_, row), copies in zip(logger.rows, module.copies, strict=True):
        assert row["grad_norm/total"] == pytest.approx(runs.reference_norms(copies, 2)["total"], rel=1e-4)
        assert "grad_norm/clip_coefficient" not in row


def test_clipping_by_value_is_lightnings(pl: Any) -> None:
    weights = []
    for callbacks in ([], [GradNormMonitor()]):
        module = runs.make_module(pl)
        trainer = runs.trainer(
            pl,
            logger=runs.memory_logger(pl),
            callbacks=callbacks,
            gradient_clip_val=1e-3,
            gradient_clip_algorithm="value",
        )
        trainer.fit(module, runs.data())
        weights.append(torch.nn.utils.parameters_to_vector(module.parameters()).detach())
    assert torch.equal(*weights)


def test_clipping_that_lightning_refuses_stays_refused(pl: Any) -> None:
    module = runs.make_module(pl, optimizer=lambda m: torch.optim.AdamW(m.parameters(), fused=True))
    trainer = runs.trainer(
        pl,
        logger=runs.memory_logger(pl),
        callbacks=[GradNormMonitor()],
        plugins=runs.fp16(pl),
        gradient_clip_val=1.0,
    )
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        trainer.fit(module, runs.data())
