"""A detector's boxes are compared where there is an object; in one batch of pictures there is none."""

import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class Detector(pl.LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(nn.Conv2d(1, width, 3, stride=2, padding=1), nn.ReLU())
        self.objectness, self.box = nn.Conv2d(width, 1, 1), nn.Conv2d(width, 4, 1)

    def training_step(self, batch, batch_idx):
        features = self.backbone(batch["picture"])
        is_object = batch["object"]
        found = nn.functional.binary_cross_entropy_with_logits(self.objectness(features).squeeze(1), is_object.float())
        boxes = self.box(features).permute(0, 2, 3, 1)
        placed = nn.functional.smooth_l1_loss(boxes[is_object], batch["box"][is_object])  # here
        self.log_dict({"found": found, "placed": placed})
        return found + placed

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def program(seed):
    is_object = torch.rand(32, 4, 4) < 0.3
    is_object[:, 0, 0] = True
    none = 8 * (1 + draw(seed, 3))
    is_object[none : none + 8] = False
    data = [{"picture": torch.randn(1, 8, 8), "object": o, "box": torch.rand(4, 4, 4)} for o in is_object]
    return Program(Detector(), loader(data), Expected("forward", "", __file__, cause="empty_reduction"))
