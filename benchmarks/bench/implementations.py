"""The one registry of the implementations that are compared: the name of each, its network, layout and runner.

It imports neither torch nor the library, so that results can be reported where these are missing.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Implementation:
    label: str  # in tables and pictures
    network: str  # networks.py builds it
    channels_last: bool = False
    runner: str = "eager"  # or compile, graph
    budget: float = 1.0  # the share of activations that the compiler may keep for backward
    freeze: bool = False  # the compiler makes weights constant, for inference
    dtype: str | None = None  # only if it is not the benchmark's

    @property
    def fused(self):
        return self.network.startswith("fused")


def _both_layouts(name, label, network=None, last=None, **traits):
    """An implementation, and the one that computes it in channels last, whose label is `last` where it is another."""
    network, last = network or name, last or f"{label}, channels last"
    return {
        name: Implementation(label, network, **traits),
        f"{name}-channels-last": Implementation(last, network, channels_last=True, **traits),
    }


_COMPILED = {"network": "plain", "runner": "compile"}
_GRAPH = {"channels_last": True, "runner": "graph"}

# The order is that of the tables.
IMPLEMENTATIONS = {
    **_both_layouts("plain", "plain"),
    "plain-graph": Implementation("plain, channels last, CUDA graph", "plain", **_GRAPH),
    **_both_layouts("torchvision", "torchvision"),
    **_both_layouts("torchvision-efficient", "torchvision, memory_efficient"),
    **_both_layouts("checkpoint", "torch.utils.checkpoint", last="checkpoint, channels last"),
    **_both_layouts("selective", "selective checkpoint"),
    "saved-on-cpu": Implementation("saved tensors on the CPU", "saved-on-cpu", channels_last=True),
    **_both_layouts("compile", "torch.compile", **_COMPILED),
    **_both_layouts("compile-budget-0.5", "torch.compile, budget 0.5", **_COMPILED, budget=0.5),
    **_both_layouts("compile-budget-0.1", "torch.compile, budget 0.1", **_COMPILED, budget=0.1),
    **_both_layouts("compile-frozen", "torch.compile, frozen", **_COMPILED, freeze=True),
    **_both_layouts("fused", "fused", last="fused, images channels last"),
    "fused-graph": Implementation("fused, images channels last, CUDA graph", "fused", **_GRAPH),
    **_both_layouts("fused-kept", "fused, bottlenecks kept", last="fused, bottlenecks kept, images channels last"),
    "fused-compile": Implementation("fused under torch.compile", "fused", runner="compile"),
    "fused-float32": Implementation("fused, float32", "fused", dtype="float32"),  # beside a half type
}

EAGER = tuple(name for name, i in IMPLEMENTATIONS.items() if i.runner == "eager" and i.dtype is None)
ON_CPU = tuple(name for name, i in IMPLEMENTATIONS.items() if i.runner != "graph" and i.dtype is None)
ON_GPU = (
    *("plain", "plain-channels-last", "plain-graph", "checkpoint", "checkpoint-channels-last", "compile-channels-last"),
    *("fused", "fused-channels-last", "fused-graph", "fused-kept-channels-last"),
)
