"""The networks that are compared, each built from a `Spec`, and their batches of random images.

Weights and images come from fixed seeds.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from bench.implementations import IMPLEMENTATIONS
from bench.selective_checkpoint import checkpoint_selectively
from densenet_ext import DenseNetBC, set_fallback

set_fallback("error")  # an implementation that is measured as fused has to be fused

VARIANTS = ("vanilla", "A", "B", "A+B")

# The arguments of DenseNetBC by `Implementation.network`; all others compute it plainly.
_OPTIONS = {
    "checkpoint": {"efficient": "checkpoint"},
    "fused": {"efficient": "fused"},
    "fused-kept": {"efficient": "fused", "keep_bottleneck": True},
}


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
    channels_last: bool = False  # all implementations, not only those that are so by name
    num_classes: int = 100
    blocks: tuple = ()  # layers of each block, in place of depth
    small_inputs: bool = True
    random: bool = True  # False: without the variant's masks

    @property
    def traits(self):
        return IMPLEMENTATIONS[self.implementation]

    @property
    def memory_format(self):
        channels_last = self.channels_last or self.traits.channels_last
        return torch.channels_last if channels_last else torch.contiguous_format

    @property
    def parameter_dtype(self):
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def layers(self):
        """Dense layers of each block."""
        return tuple(self.blocks) or ((self.depth - 4) // 6,) * 3

    @property
    def stem_channels(self):
        return 2 * self.growth_rate

    @property
    def squeeze_excite(self):
        return "B" in self.variant

    def new_network(self):
        """The network as its constructor leaves it."""
        network = self.traits.network
        if network.startswith("torchvision"):
            return _torchvision_network(self)
        options = _OPTIONS.get(network, {"efficient": False}) | {
            "block_config": self.layers,
            "growth_rate": self.growth_rate,
            "num_classes": self.num_classes,
            "small_inputs": self.small_inputs,
        }
        if not self.random:
            options |= {"drop_rate": 0.0, "drop_channel": 0.0}
        model = DenseNetBC.variant(self.variant, **options) if self.variant else DenseNetBC(**options)
        return checkpoint_selectively(model) if network == "selective" else model

    def saved_tensors(self):
        """The context of the forward pass that says where tensors wait for backward."""
        if self.traits.network == "saved-on-cpu":
            return torch.autograd.graph.save_on_cpu(pin_memory=self.device.startswith("cuda"))
        return nullcontext()

    def autocast(self):
        """The context of the forward pass that chooses types."""
        if self.dtype in ("bfloat16", "float16"):
            return torch.autocast(torch.device(self.device).type, getattr(torch, self.dtype))
        return nullcontext()


def _torchvision_network(spec):
    """torchvision's DenseNet, with a CIFAR stem for small inputs: layer for layer DenseNetBC's, written by others."""
    import torchvision

    if spec.variant not in ("", "vanilla"):
        raise ValueError(f"variant is {spec.variant!r}; torchvision has no Drop-Channel and no squeeze-and-excitation")
    model = torchvision.models.DenseNet(
        spec.growth_rate,
        spec.layers,
        spec.stem_channels,
        drop_rate=0.2 if spec.variant == "vanilla" and spec.random else 0.0,
        num_classes=spec.num_classes,
        memory_efficient=spec.traits.network == "torchvision-efficient",
    )
    if spec.small_inputs:
        model.features.conv0 = torch.nn.Conv2d(3, spec.stem_channels, 3, padding=1, bias=False)
        for name in ("norm0", "relu0", "pool0"):
            delattr(model.features, name)
    return model


def build_model(spec):
    """The network of `spec`, weights from a fixed seed, in training mode."""
    torch.manual_seed(0)
    model = spec.new_network().to(device=spec.device, dtype=spec.parameter_dtype)
    # The fused op reads weights in PyTorch's layout: only images, and with them the stem, have a layout to choose.
    return (model if spec.traits.fused else model.to(memory_format=spec.memory_format)).train()


def build_batch(spec, batch_size=None, size=None):
    """Random images [N, 3, H, W] and labels [N], equal in every implementation."""
    generator = torch.Generator().manual_seed(1)
    size, batch_size = size or spec.size, batch_size or spec.batch_size
    images = torch.randn(batch_size, 3, size, size, generator=generator)
    labels = torch.randint(spec.num_classes, (batch_size,), generator=generator).to(spec.device)
    return images.to(device=spec.device, dtype=spec.parameter_dtype, memory_format=spec.memory_format), labels
