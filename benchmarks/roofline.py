"""Bytes that have to be moved and operations that have to be done, by formula: the floor under a measured time.

M rows (pixels of all samples), C channels read, K2 bottleneck width as stored (a multiple of 16), k growth rate, O
outputs of a transition, N samples; e bytes of a stored value (4 float32, 2 bfloat16), a = 4 of a parameter.
Each input is read once and each output written once; tables of a few numbers a channel are left out.
"""

from dataclasses import dataclass, replace

ARITHMETIC_BYTES = 4
STORAGE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}

# what is read and written, for the notes under the table of kernels
FORMULAS = {
    "append": "2 M C e",
    "fold_norm": "2 N C a",
    "bottleneck_forward": "M (C + K2) e + K2 C a",
    "bottleneck_backward": "M (3 C + 2 K2) e + 2 K2 C a",
    "conv3x3_forward": "M (K2 + k) e + 9 K2 k a",
    "conv3x3_backward": "M (2 K2 + 2 k) e + 18 K2 k a",
    "squeeze_excite_forward": "2 M k e",
    "squeeze_excite_backward": "2 M k e",
    "transition_forward": "M (C + O / 4) e + O C a",
    "transition_backward": "M (2 C + O / 4) e + 2 O C a",
    "head_forward": "M C e + N C e",
    "head_backward": "2 M C e + N C e",
    "finish_gradient": "3 M C e",
    "stem_forward": "M C e + M C e / 4",
    "stem_backward": "2 M C e + M C e / 4",
}


@dataclass(frozen=True)
class Size:
    """One op's size: N samples of H x W pixels, C channels read (of `total` in the buffer)."""

    samples: int
    height: int
    width: int
    channels: int
    bottleneck: int = 0
    growth: int = 0
    outputs: int = 0
    total: int = 0
    earlier: int = 0  # channels that the layer reads whose b is computed again on the way; 0: none is

    @property
    def rows(self):
        return self.samples * self.height * self.width

    @property
    def pitch(self):
        return (self.bottleneck + 15) // 16 * 16


def op_bytes(op, s, e, a=ARITHMETIC_BYTES):
    """Bytes of one kernel op at size `s`, as FORMULAS says.

    With a bottleneck computed again on the way, of a layer that reads C' channels, M K2 e + K2 C' a more: x is there.
    """
    m, n, c, k2, k, o = s.rows, s.samples, s.channels, s.pitch, s.growth, s.outputs
    pooled = s.samples * (s.height // 2) * (s.width // 2)
    stem_pooled = s.samples * ((s.height + 1) // 2) * ((s.width + 1) // 2)
    weight1, weight3, weight_out = s.bottleneck * c * a, 9 * s.bottleneck * k * a, o * c * a
    again = m * k2 * e + s.bottleneck * s.earlier * a if s.earlier else 0
    return {
        "append": 2 * m * c * e,
        "fold_norm": 2 * n * c * a,
        "bottleneck_forward": m * (c + k2) * e + weight1,
        "bottleneck_backward": m * (3 * c + 2 * k2) * e + 2 * weight1 + again,
        "conv3x3_forward": m * (k2 + k) * e + weight3,
        "conv3x3_backward": m * (2 * k2 + 2 * k) * e + 2 * weight3,
        "squeeze_excite_forward": 2 * m * k * e,
        "squeeze_excite_backward": 2 * m * k * e,
        "transition_forward": m * c * e + pooled * o * e + weight_out,
        "transition_backward": 2 * m * c * e + pooled * o * e + 2 * weight_out,
        "head_forward": m * c * e + n * c * e,
        "head_backward": 2 * m * c * e + n * c * e,
        "finish_gradient": 3 * m * c * e,
        "stem_forward": (m + stem_pooled) * c * e,
        "stem_backward": (2 * m + stem_pooled) * c * e,
    }[op]


def op_flops(op, s):
    """Operations of the matrix products and convolutions alone: what is elementwise hides behind the bytes."""
    pooled = s.samples * (s.height // 2) * (s.width // 2)
    product = 2 * s.rows * s.channels * s.bottleneck
    convolution = 2 * s.rows * 9 * s.bottleneck * s.growth
    transition = 2 * pooled * s.channels * s.outputs
    return {
        "bottleneck_forward": product,
        "bottleneck_backward": 2 * product + 2 * s.rows * s.earlier * s.bottleneck,
        "conv3x3_forward": convolution,
        "conv3x3_backward": 2 * convolution,
        "transition_forward": transition,
        "transition_backward": 2 * transition,
    }.get(op, 0)


def floor_seconds(moved, flops, bandwidth, rate):
    """No version takes less: the longer of moving the bytes and doing the operations."""
    return max(moved / bandwidth, flops / rate)


@dataclass(frozen=True)
class Architecture:
    """A DenseNet by its numbers, enough to count a training step's bytes."""

    blocks: tuple
    growth: int
    size: int  # height and width of the images
    stem_channels: int
    small_inputs: bool = True
    bottleneck: int = 4  # width of a bottleneck in units of growth
    squeeze_excite: bool = False
    classes: int = 100


def step_ops(net, samples, keep_bottleneck=False, training=True):
    """(op, Size) of every kernel op in a fused step, block for block; of inference where not training."""
    size, channels, width = net.size, net.stem_channels, net.bottleneck * net.growth
    if not net.small_inputs:
        stem = Size(samples, size // 2, size // 2, channels)
        yield from ((f"stem_{direction}", stem) for direction in ("forward", "backward")[: 1 + training])
        size //= 4
    ops = ["bottleneck_forward", "conv3x3_forward"] + ["squeeze_excite_forward"] * net.squeeze_excite
    if training:
        ops += ["conv3x3_backward"] + ["squeeze_excite_backward"] * net.squeeze_excite
    for i, layers in enumerate(net.blocks):
        entering = Size(samples, size, size, channels)
        yield "append", entering
        if training:
            yield "finish_gradient", entering
        for layer in range(layers):
            s = Size(samples, size, size, channels, width, net.growth)
            yield from ((op, s) for op in ops)
            if training:
                earlier = channels - net.growth if layer and not keep_bottleneck else 0
                yield "bottleneck_backward", replace(s, earlier=earlier)
                if layer + 1 == layers and not keep_bottleneck:
                    yield "bottleneck_forward", s
            channels += net.growth
        last = i + 1 == len(net.blocks)
        s = Size(samples, size, size, channels, outputs=0 if last else channels // 2)
        for direction in ("forward", "backward")[: 1 + training]:
            yield f"{'head' if last else 'transition'}_{direction}", s
        if not last:
            size, channels = size // 2, s.outputs


def step_bytes(net, samples, e, keep_bottleneck=False, training=True):
    """Bytes of a fused training step: forward, backward with the bottlenecks computed again unless kept, optimizer; or
    of inference.

    The first convolution is counted as PyTorch computes it; everything else by the formulas above.
    """
    ops = list(step_ops(net, samples, keep_bottleneck, training))
    total = stem_bytes(net, samples, e, training) + sum(op_bytes(op, s, e) for op, s in ops)
    # SGD: weight, gradient and momentum read, two of them written
    return total + (5 * parameters(net) * ARITHMETIC_BYTES if training else 0)


def parameters(net):
    """Weights of the convolutions after the stem and of the classifier: all but a few."""
    counts = {
        "bottleneck_forward": lambda s: s.bottleneck * s.channels,
        "conv3x3_forward": lambda s: 9 * s.bottleneck * s.growth,
        "transition_forward": lambda s: s.outputs * s.channels,
        "head_forward": lambda s: s.channels * net.classes,
    }
    return sum(counts[op](s) for op, s in step_ops(net, 1, training=False) if op in counts)


def step_flops(net, samples, training=True):
    """Operations of the plain network's convolutions and classifier, computed directly: forward and both gradients.

    What torch.utils.flop_counter counts. A transition's convolution comes before its pooling here; the images need no
    gradient.
    """
    times, total = 3 if training else 1, 0
    for op, s in step_ops(net, samples, True, training=False):
        if op == "transition_forward":
            total += 2 * s.rows * s.channels * s.outputs
        elif op == "squeeze_excite_forward":
            total += 2 * samples * 2 * s.growth * max(1, s.growth // 16)
        elif op == "head_forward":
            total += 2 * samples * s.channels * net.classes
        else:
            total += op_flops(op, s)
    return times * total + (times - training) * stem_flops(net, samples)


def stem_flops(net, samples):
    """Of its convolution, in one direction."""
    side, kernel = (net.size, 3) if net.small_inputs else (net.size // 2, 7)
    return 2 * samples * side**2 * kernel**2 * 3 * net.stem_channels


def stem_bytes(net, samples, e, training=True):
    """Of its convolution: forward, and the gradient of the weight."""
    side = net.size if net.small_inputs else net.size // 2
    return samples * (net.size**2 * 3 + side**2 * net.stem_channels) * e * (1 + training)
