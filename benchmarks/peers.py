"""What is compared: the plain network in its layouts, recomputation, a compiler, CUDA graphs, and the fused one."""

from collections.abc import Callable
from dataclasses import dataclass

import harness
import torch
from harness import TrainingStep


@dataclass(frozen=True)
class Peer:
    """An implementation of harness.IMPLEMENTATIONS, its layout, and what runs its step."""

    implementation: str
    channels_last: bool = False
    runner: str = "eager"  # or compile, graph
    budget: float = 1.0  # of the compiler: the share of activations that it may keep
    freeze: bool = False  # of the compiler: weights become constants, for inference
    dtype: str | None = None  # where it is not the benchmark's


PEERS = {
    "plain": Peer("plain"),
    "plain-channels-last": Peer("plain", True),
    "checkpoint": Peer("checkpoint"),
    "checkpoint-channels-last": Peer("checkpoint", True),
    "compile": Peer("plain", True, "compile"),
    "plain-graph": Peer("plain", True, "graph"),
    "fused": Peer("fused"),
    "fused-channels-last": Peer("fused", True),
    "fused-kept": Peer("fused-kept", True),
    "fused-graph": Peer("fused", True, "graph"),
}


class GpuStep(TrainingStep):
    """One training step on `device`, not waited for. The first, at full size, is its warm-up."""

    def __init__(self, spec, runner, device):
        self.device, self.runner = device, runner
        super().__init__(spec)

    def warm_up(self):
        if self.runner == "compile":
            self.model = self.device.compile(self.model)
        torch.manual_seed(2)  # the same masks in every implementation whose random numbers are torch's
        self.optimizer.zero_grad()
        loss = self.forward()
        self.first_loss = loss.item()
        self.finish(loss)
        self.device.synchronize()

    def __call__(self):
        self.optimizer.zero_grad()  # gradients become None, PyTorch's default: backward need not add to them
        self.finish(self.forward())

    def run(self) -> Callable:
        """What is timed, with the memory that it takes: peak and kept bytes over parameters, gradients and momentum,
        and what the allocator reserved for it."""
        if self.runner == "graph":
            captured = []
            peak, reserved = self.device.peak(
                lambda: captured.append(self.device.capture(self, self.optimizer.zero_grad))
            )
            return captured[0], {"peak_bytes": peak, "kept_bytes": None, "reserved_bytes": reserved}
        before = self.device.reserved()
        memory = harness.measure_memory(self)
        reserved = None if memory.reserved_bytes is None else memory.reserved_bytes - before
        return self, {"peak_bytes": memory.peak_bytes, "kept_bytes": memory.kept_bytes, "reserved_bytes": reserved}
