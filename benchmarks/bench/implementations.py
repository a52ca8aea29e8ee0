"""The one registry of the implementations that are compared: the name of each, its network, layout and runner.

It imports neither torch nor the library, so that results can be reported where these are missing.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Implementation:
    label: str  # in tables and pictures
    network: str  # as networks.py builds it
    channels_last: bool = False
    runner: str = "eager"  # or compile, graph
    budget: float = 1.0  # the share of activations that the compiler may keep for backward
    freeze: bool = False  # the compiler makes weights constant, for inference
    dtype: str | None = None  # where it is not the benchmark's

    @property
    def fused(self):
        return self.network.startswith("fused")


_LAST = {"channels_last": True}
_COMPILE, _GRAPH = {"runner": "compile"}, {"runner": "graph"}
_EFFICIENT = "torchvision-efficient"

# The order is that of the tables.
IMPLEMENTATIONS = {
    "plain": Implementation("plain", "plain"),
    "plain-channels-last": Implementation("plain, channels last", "plain", **_LAST),
    "plain-graph": Implementation("plain, channels last, CUDA graph", "plain", **_LAST, **_GRAPH),
    "torchvision": Implementation("torchvision", "torchvision"),
    "torchvision-channels-last": Implementation("torchvision, channels last", "torchvision", **_LAST),
    "torchvision-efficient": Implementation("torchvision, memory_efficient", _EFFICIENT),
    "torchvision-efficient-channels-last": Implementation(
        "torchvision, memory_efficient, channels last", _EFFICIENT, **_LAST
    ),
    "checkpoint": Implementation("torch.utils.checkpoint", "checkpoint"),
    "checkpoint-channels-last": Implementation("checkpoint, channels last", "checkpoint", **_LAST),
    "selective": Implementation("selective checkpoint", "selective"),
    "selective-channels-last": Implementation("selective checkpoint, channels last", "selective", **_LAST),
    "saved-on-cpu": Implementation("saved tensors on the CPU", "saved-on-cpu", **_LAST),
    "compile": Implementation("torch.compile", "plain", **_COMPILE),
    "compile-channels-last": Implementation("torch.compile, channels last", "plain", **_LAST, **_COMPILE),
    "compile-budget-0.5": Implementation("torch.compile, budget 0.5", "plain", **_COMPILE, budget=0.5),
    "compile-budget-0.5-channels-last": Implementation(
        "torch.compile, budget 0.5, channels last", "plain", **_LAST, **_COMPILE, budget=0.5
    ),
    "compile-budget-0.1": Implementation("torch.compile, budget 0.1", "plain", **_COMPILE, budget=0.1),
    "compile-budget-0.1-channels-last": Implementation(
        "torch.compile, budget 0.1, channels last", "plain", **_LAST, **_COMPILE, budget=0.1
    ),
    "compile-frozen": Implementation("torch.compile, frozen", "plain", **_COMPILE, freeze=True),
    "compile-frozen-channels-last": Implementation(
        "torch.compile, frozen, channels last", "plain", **_LAST, **_COMPILE, freeze=True
    ),
    "fused": Implementation("fused", "fused"),
    "fused-channels-last": Implementation("fused, images channels last", "fused", **_LAST),
    "fused-graph": Implementation("fused, images channels last, CUDA graph", "fused", **_LAST, **_GRAPH),
    "fused-kept": Implementation("fused, bottlenecks kept", "fused-kept"),
    "fused-kept-channels-last": Implementation("fused, bottlenecks kept, images channels last", "fused-kept", **_LAST),
    "fused-compile": Implementation("fused under torch.compile", "fused", **_COMPILE),
    "fused-float32": Implementation("fused, float32", "fused", dtype="float32"),  # beside a half type
}

EAGER = tuple(name for name, i in IMPLEMENTATIONS.items() if i.runner == "eager" and i.dtype is None)
ON_CPU = tuple(name for name, i in IMPLEMENTATIONS.items() if i.runner != "graph" and i.dtype is None)
ON_GPU = (
    *("plain", "plain-channels-last", "plain-graph", "checkpoint", "checkpoint-channels-last", "compile-channels-last"),
    *("fused", "fused-channels-last", "fused-graph", "fused-kept-channels-last"),
)
