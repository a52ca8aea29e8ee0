"""One training step on a GPU: eager, compiled, or as the replay of a CUDA graph."""

import torch

from bench.memory_meter import measure_memory
from bench.steps import TrainingStep


class GpuStep(TrainingStep):
    """One training step on `device`, not waited for. The first, at full size, is its warm-up."""

    def __init__(self, spec, device):
        self.device, self.runner = device, spec.traits.runner
        super().__init__(spec)

    def warm_up(self):
        if self.runner == "compile":
            self.model = self.device.compile(self.model)
        torch.manual_seed(2)  # equal masks in every implementation whose random numbers are torch's
        self.optimizer.zero_grad()
        loss = self.forward()
        self.first_loss = loss.item()
        self.finish(loss)
        self.device.synchronize()

    def __call__(self):
        self.optimizer.zero_grad()  # gradients become None, PyTorch's default: backward need not add to them
        self.finish(self.forward())

    def run(self):
        """The function to be timed, with the memory that it takes: peak and kept bytes over parameters, gradients and
        momentum, and what the allocator reserved for it."""
        if self.runner == "graph":
            captured = []
            peak, reserved = self.device.peak(
                lambda: captured.append(self.device.capture(self, self.optimizer.zero_grad))
            )
            return captured[0], {"peak_bytes": peak, "kept_bytes": None, "reserved_bytes": reserved}
        start = self.device.reserved()
        memory = measure_memory(self)
        reserved = None if memory.reserved_bytes is None else memory.reserved_bytes - start
        return self, {"peak_bytes": memory.peak_bytes, "kept_bytes": memory.kept_bytes, "reserved_bytes": reserved}


class Sample:
    """Several steps in a row, timed as one."""

    def __init__(self, function, count):
        self.function, self.count, self.running = function, count, False

    def __call__(self):
        self.running = True
        for _ in range(self.count):
            self.function()
        self.running = False
