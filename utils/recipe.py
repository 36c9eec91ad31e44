"""How a run takes its steps: the precision, what is minimized, and the learning rate."""

import math
from dataclasses import dataclass

from utils.device import Precision

WARM_UP = 0.2  # of all steps


@dataclass
class Recipe:
    """How steps are taken. The defaults are the course's: squared error at a constant rate."""

    precision: Precision = Precision()
    colorfulness_weight: float = 0.0
    lr: float | None = None  # the highest; None leaves the optimizer's rate alone
    steps: int = 0  # of the whole run, for the rate

    def objective(self, squared_error, dullness):
        """Return what is minimized."""
        return squared_error + self.colorfulness_weight * dullness

    def get_lr(self, step):
        """Return the learning rate of the step (from 0): a linear warm-up, then half a cosine."""
        warm_up = math.ceil(WARM_UP * self.steps)
        if step < warm_up:
            return self.lr * (step + 1) / warm_up
        done = (step - warm_up) / max(1, self.steps - warm_up)
        return self.lr * (1 + math.cos(math.pi * min(1, done))) / 2
