"""The groups of training steps on a GPU: a network, a type and a batch size, in which implementations are compared."""

from dataclasses import dataclass, replace

from bench.workloads import spec_of_network


@dataclass(frozen=True)
class Group:
    net: str
    dtype: str
    batch_size: int
    share: float  # of the time for all groups
    implementations: tuple

    @property
    def key(self):
        return f"{self.net} {self.dtype} {self.batch_size}"


# Groups and implementations stand in the order of their importance: time may run out.
DENSENET121 = (
    "plain-channels-last",
    "fused-channels-last",
    "compile-channels-last",
    "plain",
    "fused",
    "checkpoint",
    "fused-graph",
    "fused-kept-channels-last",
    "checkpoint-channels-last",
)
CIFAR = (
    "plain",
    "fused",
    "plain-channels-last",
    "checkpoint",
    "fused-channels-last",
    "fused-graph",
    "fused-kept-channels-last",
    "compile-channels-last",
    "plain-graph",
)
GROUPS = (
    Group("densenet121", "bfloat16", 256, 0.40, DENSENET121),
    Group("cifar", "float32", 64, 0.15, CIFAR),
    Group("cifar", "bfloat16", 64, 0.12, CIFAR),
    Group("cifar", "bfloat16", 256, 0.10, CIFAR),
    Group("densenet121", "float32", 256, 0.17, DENSENET121),
    Group("cifar", "float32", 256, 0.06, CIFAR),
)

# DenseNet-121 ends with 2x2 pixels: the gradient of a norm over two values is all rounding.
TINY = {"growth_rate": 4, "batch_size": 2}
TINY_SIZE = {"cifar": 8, "densenet121": 64}


@dataclass(frozen=True)
class Request:
    """The groups that a command line asks for, and how they are computed."""

    device: object
    variant: str = "A+B"  # of the CIFAR network
    tiny: bool = False
    words: tuple = ()  # groups whose key has one of them; empty: all
    implementations: tuple = ()  # empty: all

    def groups(self):
        """The groups with shares that add up to 1. A rehearsal takes the first three."""
        chosen = [g for g in GROUPS if not self.words or any(word in g.key for word in self.words)]
        chosen = chosen[: 3 if self.tiny else None]
        whole = sum(g.share for g in chosen)
        return [replace(g, share=g.share / whole, implementations=self._chosen(g)) for g in chosen]

    def _chosen(self, group):
        names = group.implementations
        return tuple(name for name in names if name in self.implementations) if self.implementations else names

    def spec(self, group, implementation):
        """The `Spec` of one implementation of a group; of the same kind but tiny for a rehearsal."""
        sizes = {"batch_size": group.batch_size} | ({"variant": self.variant} if group.net == "cifar" else {})
        if self.tiny:
            sizes |= TINY | {"size": TINY_SIZE[group.net]}
        spec = replace(spec_of_network(group.net, self.tiny), **sizes)
        return replace(spec, implementation=implementation, dtype=group.dtype, device=self.device.name)
