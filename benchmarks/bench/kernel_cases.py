"""The sizes at which each kernel op is timed: layers of the networks, and odd sizes beside even ones."""

from dataclasses import dataclass, replace

from bench.roofline import Size

JOINT = ("bottleneck_forward", "bottleneck_backward")
LAYER = (*JOINT, "conv3x3_forward", "conv3x3_backward")
EXCITE = ("squeeze_excite_forward", "squeeze_excite_backward")
TRANSITION = ("append", "fold_norm", "transition_forward", "transition_backward", "finish_gradient")
HEAD = ("head_forward", "head_backward")
STEM = ("stem_forward", "stem_backward")

NETS = ("cifar", "densenet121", "bc190", "odd")
CIFAR, IMAGENET, WIDE = ({"width": 4 * growth, "growth": growth} for growth in (12, 32, 40))


def _layer(samples, height, width, growth):
    return Size(samples, height, width, 120, 4 * growth, growth, total=120 + growth)


# Pairs of layers that are held against each other: an odd size and an even one.
PAIRS = {
    "33x31 against 32x32": (_layer(16, 33, 31, 12), _layer(16, 32, 32, 12)),
    "14x14 against 16x16": (_layer(64, 14, 14, 12), _layer(64, 16, 16, 12)),
    "7x7 against 8x8": (_layer(64, 7, 7, 12), _layer(64, 8, 8, 12)),
    "growth 5 against growth 8": (_layer(16, 32, 32, 5), _layer(16, 32, 32, 8)),
    "growth 40 against growth 32": (_layer(16, 32, 32, 40), _layer(16, 32, 32, 32)),
}


@dataclass(frozen=True)
class Case:
    net: str
    size: Size
    ops: tuple

    @property
    def name(self):
        s = self.size
        growth = f" k{s.growth}" if self.net == "odd" else ""
        return f"{self.net} {s.height}x{s.width} N{s.samples} C{s.channels}{growth}"


def layer_cases(net, samples, size, total, channels, width, growth, *, excite=(), consumer=(), outputs=0):
    """Layers that read so many channels; all ops of a layer for the middle one, the 1x1 alone for the others."""
    middle = channels[len(channels) // 2]
    cases = [
        Case(net, Size(samples, size, size, c, width, growth, total=total), (*LAYER, *excite) if c == middle else JOINT)
        for c in channels
    ]
    if consumer:
        cases.append(Case(net, Size(samples, size, size, total, outputs=outputs, total=total), consumer))
    return cases


def tiny_cases():
    return [
        *layer_cases("cifar", 2, 8, 24, (8, 20), 16, 4, excite=EXCITE, consumer=TRANSITION, outputs=12),
        *layer_cases("densenet121", 2, 4, 40, (32,), 32, 8, consumer=HEAD),
        Case("densenet121", Size(2, 8, 8, 8, total=8), STEM),
    ]


def gpu_cases():
    """The layers of DenseNet-BC(100, k=12) and of DenseNet-121: three where the bytes are, one elsewhere."""
    return [
        *layer_cases("densenet121", 256, 56, 256, (64, 128, 224), **IMAGENET, consumer=TRANSITION, outputs=128),
        Case("densenet121", Size(256, 112, 112, 64, total=64), STEM),
        *layer_cases("cifar", 64, 32, 216, (24, 120, 204), **CIFAR, excite=EXCITE, consumer=TRANSITION, outputs=108),
        *layer_cases("cifar", 256, 32, 216, (24, 120, 204), **CIFAR, excite=EXCITE, consumer=TRANSITION, outputs=108),
        *layer_cases("densenet121", 256, 14, 1024, (256, 640, 992), **IMAGENET),
        *layer_cases("densenet121", 256, 28, 512, (320,), **IMAGENET),
        *layer_cases("densenet121", 256, 7, 1024, (992,), **IMAGENET, consumer=HEAD),
        *layer_cases("cifar", 256, 16, 300, (204,), **CIFAR),
        *layer_cases("cifar", 256, 8, 342, (246,), **CIFAR, consumer=HEAD),
    ]


def cpu_cases(tiny=False):
    """The layers of three networks, and those of PAIRS."""
    if tiny:
        return [*tiny_cases(), *(Case("odd", replace(size, samples=2), LAYER) for size in PAIRS["7x7 against 8x8"])]
    return [
        *layer_cases("cifar", 64, 32, 216, (24, 120, 204), **CIFAR, excite=EXCITE, consumer=TRANSITION, outputs=108),
        *layer_cases("cifar", 64, 16, 300, (204,), **CIFAR, consumer=TRANSITION, outputs=150),
        *layer_cases("cifar", 64, 8, 342, (246,), **CIFAR, consumer=HEAD),
        Case("densenet121", Size(8, 112, 112, 64), STEM),
        *layer_cases("densenet121", 8, 56, 256, (64, 128, 224), **IMAGENET, consumer=TRANSITION, outputs=128),
        *layer_cases("densenet121", 8, 28, 512, (320,), **IMAGENET, consumer=TRANSITION, outputs=256),
        *layer_cases("densenet121", 8, 14, 1024, (640,), **IMAGENET, consumer=TRANSITION, outputs=512),
        *layer_cases("densenet121", 8, 7, 1024, (768,), **IMAGENET, consumer=HEAD),
        *layer_cases("bc190", 8, 32, 1320, (80, 680, 1280), **WIDE, consumer=TRANSITION, outputs=660),
        *layer_cases("bc190", 8, 16, 1900, (1260,), **WIDE, consumer=TRANSITION, outputs=950),
        *layer_cases("bc190", 8, 8, 2190, (1550,), **WIDE, consumer=HEAD),
        *dict.fromkeys(Case("odd", size, LAYER) for pair in PAIRS.values() for size in pair),
    ]
