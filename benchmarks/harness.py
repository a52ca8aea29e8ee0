"""What every benchmark shares: one training step, and how its memory and time are measured.

Memory is in MB of 10^6 bytes, over the parameters, their gradients and the optimizer's state, which exist before the
step that is measured. Batches are random; weights come from a fixed seed.
"""

import gc
import os
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler's own messages; read when torch is loaded

import others
import torch
import torch.nn.functional as F
from roofline import Architecture
from torch.profiler import ProfilerActivity, profile, record_function

from densenet_ext import DenseNetBC, release_workspaces, set_fallback, workspace_use

MB = 1e6

set_fallback("error")  # what is measured as fused shall be fused

# name -> (arguments of DenseNetBC, channels last)
IMPLEMENTATIONS = {
    "plain": ({"efficient": False}, False),
    "plain-channels-last": ({"efficient": False}, True),
    "checkpoint": ({"efficient": "checkpoint"}, False),
    "checkpoint-channels-last": ({"efficient": "checkpoint"}, True),
    "selective": ({"efficient": False}, False),  # others.py
    "selective-channels-last": ({"efficient": False}, True),
    "saved-on-cpu": ({"efficient": False}, True),
    "fused": ({"efficient": "fused"}, False),
    "fused-channels-last": ({"efficient": "fused"}, True),
    "fused-kept": ({"efficient": "fused", "keep_bottleneck": True}, False),
    "torchvision": (None, False),
    "torchvision-channels-last": (None, True),
    "torchvision-efficient": (None, False),
    "torchvision-efficient-channels-last": (None, True),
}
VARIANTS = ("vanilla", "A", "B", "A+B")
DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Spec:
    """One row of a benchmark: which network, how it is computed, on what."""

    implementation: str = "fused"
    variant: str = "A+B"  # or "": DenseNet-BC as it was published, without dropout
    depth: int = 100
    growth_rate: int = 12
    batch_size: int = 64
    size: int = 32
    dtype: str = "float32"  # bfloat16 and float16: autocast over float32 parameters, as people train
    device: str = "cpu"
    channels_last: bool = False
    num_classes: int = 100
    blocks: tuple = ()  # layers of each block, in place of depth
    small_inputs: bool = True
    random: bool = True  # False: without the variant's masks

    @property
    def memory_format(self):
        channels_last = self.channels_last or IMPLEMENTATIONS[self.implementation][1]
        return torch.channels_last if channels_last else torch.contiguous_format

    @property
    def weights_format(self):
        # The fused op reads weights as PyTorch keeps them, whatever comes in: only the images, and with them the stem,
        # have a layout to choose.
        fused = self.implementation.startswith("fused")
        return torch.contiguous_format if fused else self.memory_format

    @property
    def layers(self):
        """Dense layers of each block."""
        return tuple(self.blocks) or ((self.depth - 4) // 6,) * 3

    def architecture(self):
        """What roofline.py counts with."""
        return Architecture(
            self.layers,
            self.growth_rate,
            self.size,
            2 * self.growth_rate,
            self.small_inputs,
            squeeze_excite="B" in self.variant,
            classes=self.num_classes,
        )

    def new_network(self):
        """The network as its constructor leaves it."""
        options, _ = IMPLEMENTATIONS[self.implementation]
        if options is None:
            return others.torchvision_network(self)
        options = options | {
            "block_config": self.layers,
            "growth_rate": self.growth_rate,
            "num_classes": self.num_classes,
            "small_inputs": self.small_inputs,
        }
        if not self.random:
            options |= {"drop_rate": 0.0, "drop_channel": 0.0}
        model = DenseNetBC.variant(self.variant, **options) if self.variant else DenseNetBC(**options)
        return others.checkpoint_selectively(model) if self.implementation.startswith("selective") else model

    def saved_tensors(self):
        """The context of the forward pass that says where tensors wait for backward."""
        if self.implementation == "saved-on-cpu":
            return torch.autograd.graph.save_on_cpu(pin_memory=self.device.startswith("cuda"))
        return nullcontext()

    def autocast(self):
        """The context of the forward pass."""
        if self.dtype in ("bfloat16", "float16"):
            return torch.autocast(torch.device(self.device).type, getattr(torch, self.dtype))
        return nullcontext()


def build_model(spec):
    """The network of `spec`, weights from a fixed seed, in training mode."""
    torch.manual_seed(0)
    dtype = torch.float64 if spec.dtype == "float64" else torch.float32
    return spec.new_network().to(device=spec.device, dtype=dtype, memory_format=spec.weights_format).train()


def build_batch(spec, batch_size=None, size=None):
    """Random images [N, 3, H, W] and labels [N], the same for every implementation."""
    generator = torch.Generator().manual_seed(1)
    size, batch_size = size or spec.size, batch_size or spec.batch_size
    images = torch.randn(batch_size, 3, size, size, generator=generator)
    labels = torch.randint(spec.num_classes, (batch_size,), generator=generator).to(spec.device)
    dtype = torch.float64 if spec.dtype == "float64" else torch.float32
    return images.to(device=spec.device, dtype=dtype, memory_format=spec.memory_format), labels


class TrainingStep:
    """Model, optimizer and batch of one `Spec`; calling it trains one step and waits for the device."""

    def __init__(self, spec):
        self.spec = spec
        self.model = build_model(spec)
        # fused: one pass, and on a GPU one launch, for many parameters
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, fused=True)
        self.batch = build_batch(spec)
        self.warm_up()

    def warm_up(self):
        """A step on two images of 8x8: allocates gradients and momentum, starts threads, loads libraries."""
        batch, self.batch = self.batch, build_batch(self.spec, batch_size=2, size=8)
        self()
        self.batch = batch

    def clear(self):
        """Gradients to zero; they stay allocated."""
        self.optimizer.zero_grad(set_to_none=False)

    def forward(self):
        images, labels = self.batch
        with self.spec.autocast(), self.spec.saved_tensors():
            return F.cross_entropy(self.model(images), labels)

    def finish(self, loss):
        loss.backward()
        self.optimizer.step()

    def __call__(self):
        self.clear()
        self.finish(self.forward())
        self.synchronize()

    def synchronize(self):
        if self.spec.device != "cpu":
            torch.accelerator.synchronize()


@dataclass(frozen=True)
class Memory:
    """Memory over parameters, gradients and optimizer state."""

    peak_bytes: int  # highest level in the step, workspaces included
    kept_bytes: int  # level between forward and backward: what is kept for backward
    workspace_bytes: int = 0  # CPU: what the library's own workspaces occupy after the step, held or not
    reserved_bytes: int | None = None  # CUDA: what the caching allocator took from the device at the peak, all included


def measure_memory(step):
    """The `Memory` of one call of `step`."""
    gc.collect()
    step.clear()
    return _cuda_memory(step) if step.spec.device.startswith("cuda") else _cpu_memory(step)


def _cuda_memory(step):
    step()  # libraries choose algorithms and take workspaces in a first full step
    step.clear()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    loss = step.forward()
    kept = torch.cuda.memory_allocated() - start
    step.finish(loss)
    torch.cuda.synchronize()
    return Memory(torch.cuda.max_memory_allocated() - start, kept, reserved_bytes=torch.cuda.max_memory_reserved())


def _cpu_memory(step):
    """Sums the allocations and frees that the profiler records, in time order.

    It sees what goes through torch's CPU allocator, from Python or from C++. The library's own workspaces do not: all
    that they occupy is added to the peak, and what tensors hold of it after the forward pass to what is kept. Scratch
    memory of other libraries is seen by resident.py alone.
    """
    release_workspaces()
    before = workspace_use()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        with record_function("benchmark: forward"):
            loss = step.forward()
        held = workspace_use().held - before.held
        step.finish(loss)
    workspaces = workspace_use().occupied - before.occupied
    events = recorded.profiler.kineto_results.events()
    forward_end = next(e.start_ns() + e.duration_ns() for e in events if e.name() == "benchmark: forward")
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    level = peak = kept = 0
    for when, _, nbytes in changes:
        level += nbytes
        peak = max(peak, level)
        if when <= forward_end:
            kept = level
    return Memory(peak + workspaces, kept + held, workspaces)


def wall_seconds(step):
    """Seconds of one call, which has to wait for the device itself."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def interleave(steps, rounds, deadline=None, progress=None, seconds=wall_seconds):
    """Seconds a step: {key: list of times}. `steps` {key: callable}, `rounds` an int or {key: int}.

    One step of each in turn, starting one further every round, so that what else the machine does falls on all alike.
    After the first round none is begun that would last beyond `deadline` (of time.monotonic). `seconds` measures a call.
    """
    rounds = rounds if isinstance(rounds, dict) else dict.fromkeys(steps, rounds)
    times = {key: [] for key in steps}
    longest = 0.0
    for r in range(max(rounds.values())):
        began = time.monotonic()
        if r and deadline is not None and began + longest > deadline:
            break
        keys = [key for key in steps if r < rounds[key]]
        for key in keys[r % len(keys) :] + keys[: r % len(keys)]:
            times[key].append(seconds(steps[key]))
            if progress is not None:
                progress.update()
        longest = max(longest, time.monotonic() - began)
    return times


def quantiles(times):
    """Median, 20 % and 80 % quantile."""
    if len(times) < 2:
        return times[0], times[0], times[0]
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return statistics.median(times), fifths[0], fifths[3]
