"""The groups of training steps on a GPU: a network, a type and a batch size, in which implementations are compared."""

from dataclasses import dataclass, replace

from bench.networks import Spec
from bench.workloads import spec_of_network


@dataclass(frozen=True)
class Group:
    net: str
    dtype: str
    batch_size: int
    share: float  # of the time for all groups
    implementations: tuple
    spec: Spec | None = None

    @property
    def key(self):
        return f"{self.net} {self.dtype} {self.batch_size}"

    def spec_of(self, implementation):
        return replace(self.spec, implementation=implementation)


# Groups and implementations stand in the order of their importance: time may run out.
DENSENET121 = (
    *("plain-channels-last", "fused-channels-last", "compile-channels-last", "plain", "fused", "checkpoint"),
    *("fused-graph", "fused-kept-channels-last", "checkpoint-channels-last"),
)
CIFAR = (
    *("plain", "fused", "plain-channels-last", "checkpoint", "fused-channels-last", "fused-graph"),
    *("fused-kept-channels-last", "compile-channels-last", "plain-graph"),
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


def choose_groups(device, variant="A+B", words=(), implementations=(), tiny=False):
    """The groups whose key has one of the `words` (all without any), with shares that add up to 1.

    variant: of the CIFAR network; implementations: only these, if there are any. A rehearsal takes the first three, tiny.
    """
    chosen = [g for g in GROUPS if not words or any(word in g.key for word in words)][: 3 if tiny else None]
    whole = sum(g.share for g in chosen)
    groups = []
    for g in chosen:
        names = tuple(name for name in g.implementations if name in (implementations or g.implementations))
        spec = replace(spec_of_network(g.net, tiny), dtype=g.dtype, batch_size=g.batch_size, device=device)
        if g.net == "cifar":
            spec = replace(spec, variant=variant)
        if tiny:
            spec = replace(spec, **TINY, size=TINY_SIZE[g.net])
        groups.append(replace(g, share=g.share / whole, implementations=names, spec=spec))
    return groups
