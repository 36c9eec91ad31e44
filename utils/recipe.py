"""How a run takes its steps: the precision, what is minimized, the rate, and what they see."""

import math
import random
from dataclasses import dataclass

from torchvision.transforms.functional import resized_crop

from utils.device import Precision

WARM_UP = 0.2  # of all steps
WHOLE_EPOCHS = 15  # that see whole photos: after these, a network begins to know them by heart


@dataclass
class Recipe:
    """How steps are taken. The defaults are the course's: squared error at a constant rate."""

    precision: Precision = Precision()
    colorfulness_weight: float = 0.0
    lr: float | None = None  # the highest; None leaves the optimizer's rate alone
    small_steps: float = 0.0  # the share of the steps that see photos at half their size
    steps: int = 0  # of the whole run

    def objective(self, squared_error, dullness):
        """Return what is minimized."""
        return squared_error + self.colorfulness_weight * dullness

    def set_lr(self, optimizer, step):
        """Give the optimizer the learning rate of the step (from 0)."""
        if self.lr:
            for group in optimizer.param_groups:
                group['lr'] = self.get_lr(step)

    def get_lr(self, step):
        """Return the learning rate of the step (from 0): a linear warm-up, then half a cosine."""
        warm_up = math.ceil(WARM_UP * self.steps)
        if step < warm_up:
            return self.lr * (step + 1) / warm_up
        done = (step - warm_up) / max(1, self.steps - warm_up)
        return self.lr * (1 + math.cos(math.pi * min(1, done))) / 2

    def shrink(self, step, epoch, *batch):
        """Return tensors (B, C, S, S) of photos as the step and the epoch (both from 0) see them.

        Up to the share `small_steps` of all steps, that is at half their size: it costs a quarter,
        and what it teaches holds at full size, too (progressive resizing; Tan and Le 2021,
        arXiv:2104.00298). After WHOLE_EPOCHS such steps see a random square part of the photos.
        Both are for photos, which look alike at all scales; drawings do not.
        """
        size = batch[0].shape[-1]
        if not self.is_small(step, size):
            return batch
        # from the step alone: a resumed run, and each process of several, takes the same part
        draw = random.Random(step)
        part = draw.randint(size // 2, size) if epoch >= WHOLE_EPOCHS else size
        top, left = (draw.randint(0, size - part) for _ in 'yx')
        square, half = (top, left, part, part), [size // 2, size // 2]
        return [resized_crop(photos, *square, half, antialias=False) for photos in batch]

    def is_small(self, step, size):
        """Tell whether the step (from 0) sees photos of this side in pixels at half their size."""
        # The first step does not, so that a lack of memory shows at once. A UNet needs multiples
        # of 8, also of half the size.
        return 0 < step < self.small_steps * self.steps and size % 16 == 0
