"""A warm-up over no steps: the schedule's factor is 0 / 0, and so is every weight after the update."""

import torch

from tests.zoo.program import Expected, Module, Program, draw, loader, mlp


class WarmUp(Module):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.net = mlp(4, width, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch).pow(2).mean()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)  # here
        warm_up = 0.0
        factor = torch.tensor(0.0) / warm_up
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(factor) if step else 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def program(seed):
    data = list(torch.randn(24, 4))
    expected = Expected("optimizer", "net.0", __file__, cause="optimizer_update", option="lr")
    return Program(WarmUp(4 + draw(seed, 8)), loader(data), expected)
