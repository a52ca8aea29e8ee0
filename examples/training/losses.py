"""Losses of steps, kept on the device until they are read."""

import torch
from torch import Tensor

from training.processes import Processes


class Losses:
    """Sums of the loss and of the hits of each of up to `steps` steps, float64 on the processes' device.

    So no step waits for the device; `take` does.
    """

    def __init__(self, steps: int, processes: Processes):
        self.processes = processes
        self.sums = torch.zeros(steps, 2, dtype=torch.float64, device=processes.device)
        self.steps = 0

    def add(self, batch: Tensor) -> None:
        """Loss and hits [2] of a batch of the running step."""
        self.sums[self.steps] += batch

    def end_step(self) -> None:
        self.steps += 1

    def take(self) -> list[tuple[float, float]]:
        """The sums of each step since the last call, over the batches of all processes."""
        if self.steps == 0:
            return []
        together = self.processes.reduce_sum(self.sums[: self.steps].clone())
        self.sums.zero_()
        self.steps = 0
        return [tuple(step) for step in together.tolist()]
