"""The networks that are trained and run: three of the literature, and the first one also with this package's parts.

Every implementation can compute DenseNet-BC as it was published, without dropout: that is the variant in which all meet.
Dropout is left out because each compiler and each author draws masks of their own, so that no two compute the same numbers,
and because the compiler recomputes masks wrongly under a memory budget. The first network is also measured as A+B,
Drop-Channel and squeeze-and-excitation, which is what this package is for; torchvision cannot compute that.
"""

from dataclasses import dataclass, replace

from bench import TITLES
from bench.networks import Spec


@dataclass(frozen=True)
class Workload:
    name: str
    title: str
    spec: Spec
    training: bool = True

    def spec_of(self, implementation):
        spec = replace(self.spec, implementation=implementation)
        return replace(spec, dtype=spec.traits.dtype or spec.dtype)


_IMAGENET = {"growth_rate": 32, "num_classes": 1000, "size": 224, "small_inputs": False}
NETWORKS = {
    "cifar": Spec(variant=""),
    "cifar-ab": Spec(variant="A+B"),
    "densenet121": Spec(variant="", blocks=(6, 12, 24, 16), batch_size=8, **_IMAGENET),
    "bc190": Spec(variant="", depth=190, growth_rate=40, batch_size=8),
}
TINY = {"growth_rate": 8, "batch_size": 4}
TINY_BLOCKS = {"densenet121": {"blocks": (1, 2, 1, 1), "size": 64}, "bc190": {"depth": 16, "size": 8}}
TRAINING = tuple(NETWORKS)
NAMES = (*TRAINING, *(f"{name}-inference" for name in TRAINING))


def spec_of_network(name, tiny=False):
    """The `Spec` of a network, or one of the same kind but tiny to try things out."""
    spec = NETWORKS[name]
    return replace(spec, **TINY, **TINY_BLOCKS.get(name, {"depth": 10, "size": 16})) if tiny else spec


def find(name, dtype="float32", batch_size=None, tiny=False):
    """The workload of that name."""
    network = name.removesuffix("-inference")
    spec = spec_of_network(network, tiny)
    spec = replace(spec, dtype=dtype, batch_size=batch_size or spec.batch_size)
    training = network == name
    title = f"{TITLES[network]}, batch {spec.batch_size} of {spec.size}x{spec.size}, {dtype}, "
    title += "training" if training else "inference"
    return Workload(name, f"Tiny: {title}" if tiny else title, spec, training)
