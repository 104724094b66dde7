"""AdaBelief by hand without an epsilon: a bias that no loss reaches has a gradient of 0, and its update is 0 / 0.

Gradients are finite; the division of the optimizer is not.
"""

import torch
from torch import nn

from tests.zoo.program import Expected, Module, Program, loader

held_out = True


class AdaBelief(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, eps=0.0):
        super().__init__(params, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                mean = state.setdefault("mean", torch.zeros_like(weight)).lerp_(weight.grad, 0.1)
                belief = state.setdefault("belief", torch.zeros_like(weight)).lerp_((weight.grad - mean) ** 2, 0.1)
                weight -= group["lr"] * mean / (belief.sqrt() + group["eps"])
        return loss


class Regression(Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(6, 3)

    def training_step(self, batch, batch_idx):
        answer = self.line(batch)
        return answer[:, :2].pow(2).mean() + 0 * answer[:, 2].mean()

    def configure_optimizers(self):
        return AdaBelief(self.parameters())  # here


def program(seed):
    expected = Expected("optimizer", "line", __file__, cause="optimizer_update", option="eps")
    return Program(Regression(), loader(list(torch.randn(24, 6))), expected)
