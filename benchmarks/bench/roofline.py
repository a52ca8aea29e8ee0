"""Bytes that have to be moved and operations that have to be done, by formula: the floor under a measured time.

M pixels of all N samples, P after the op's pooling; C channels read, K width of a bottleneck, K2 as it is stored (a multiple
of 16), k growth rate, O outputs of a transition, E channels of an earlier layer; e bytes of a stored value (4 float32,
2 bfloat16), a = 4 of a parameter. Each input is read once and each output written once; tables of a few numbers a channel
are left out.
"""

from dataclasses import dataclass, replace
from math import prod

ARITHMETIC_BYTES = 4
STORAGE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}

# The bytes that each op reads and writes: sums of products.
FORMULAS = {
    "append": "2 M C e",
    "fold_norm": "2 N C a",
    "bottleneck_forward": "M C e + M K2 e + K C a",
    "bottleneck_backward": "3 M C e + 2 M K2 e + 2 K C a",
    "conv3x3_forward": "M K2 e + M k e + 9 K k a",
    "conv3x3_backward": "2 M K2 e + 2 M k e + 18 K k a",
    "squeeze_excite_forward": "2 M k e",
    "squeeze_excite_backward": "2 M k e",
    "transition_forward": "M C e + P O e + O C a",
    "transition_backward": "2 M C e + P O e + 2 O C a",
    "head_forward": "M C e + N C e",
    "head_backward": "2 M C e + N C e",
    "finish_gradient": "3 M C e",
    "stem_forward": "M C e + P C e",
    "stem_backward": "2 M C e + P C e",
}
# A backward that computes an earlier layer's bottleneck again on the way does this more: x is there.
RECOMPUTED = "M K2 e + K E a"

# The operations of the matrix products and convolutions alone: elementwise ones hide behind the bytes.
OPERATIONS = {
    "bottleneck_forward": "2 M C K",
    "bottleneck_backward": "4 M C K + 2 M E K",
    "conv3x3_forward": "18 M K k",
    "conv3x3_backward": "36 M K k",
    "transition_forward": "2 P C O",
    "transition_backward": "4 P C O",
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
    earlier: int = 0  # channels that the layer reads whose bottleneck is computed again on the way; 0: none is

    @property
    def rows(self):
        return self.samples * self.height * self.width

    def evaluate(self, op, formula, e=0):
        """The value of a formula for one op; the stem's pooling pads odd maps, a transition's leaves their edges out."""
        padding = op.startswith("stem")
        pooled = self.samples * ((self.height + padding) // 2) * ((self.width + padding) // 2)
        values = {"M": self.rows, "P": pooled, "N": self.samples, "C": self.channels, "k": self.growth, "e": e}
        values |= {
            "a": ARITHMETIC_BYTES,
            "K": self.bottleneck,
            "K2": (self.bottleneck + 15) // 16 * 16,
            "O": self.outputs,
            "E": self.earlier,
        }
        terms = [term.split() for term in formula.split(" + ")]
        return sum(prod(values[word] if word in values else int(word) for word in term) for term in terms)


def op_bytes(op, size, e):
    """Bytes of one kernel op, as FORMULAS says."""
    recomputed = size.evaluate(op, RECOMPUTED, e) if op == "bottleneck_backward" and size.earlier else 0
    return size.evaluate(op, FORMULAS[op], e) + recomputed


def op_flops(op, size):
    """Operations of one kernel op, as OPERATIONS says."""
    return size.evaluate(op, OPERATIONS[op]) if op in OPERATIONS else 0


def floor(moved, flops, rates):
    """Seconds that no version takes less than, and which of moving the bytes and doing the operations takes them."""
    moving, computing = moved / rates["bytes"], flops / rates["flops"]
    return (moving, "bytes") if moving >= computing else (computing, "operations")


def rates_text(rates):
    """The rates of machine_rates.py in a line."""
    text = f"matrix product {rates['flops'] / 1e9:.0f} GFLOP/s, copy {rates['bytes'] / 1e9:.1f} GB/s"
    if "amx_flops" in rates:
        best, median = (rates[key] / 1e9 for key in ("amx_flops", "amx_flops_median"))
        text += f"; bfloat16 product on AMX {best:.0f} GFLOP/s at best, {median:.0f} in the median"
    return text


def step_ops(spec, keep_bottleneck=False, training=True):
    """(op, Size) of every kernel op in a fused step of a `Spec`, block for block; of inference where not training."""
    samples, size, channels, growth = spec.batch_size, spec.size, spec.stem_channels, spec.growth_rate
    directions = ("forward", "backward") if training else ("forward",)
    if not spec.small_inputs:
        stem = Size(samples, size // 2, size // 2, channels)
        yield from ((f"stem_{direction}", stem) for direction in directions)
        size //= 4
    ops = ["bottleneck_forward", "conv3x3_forward"] + ["squeeze_excite_forward"] * spec.squeeze_excite
    if training:
        ops += ["conv3x3_backward"] + ["squeeze_excite_backward"] * spec.squeeze_excite
    for i, layers in enumerate(spec.layers):
        entering = Size(samples, size, size, channels)
        yield "append", entering
        if training:
            yield "finish_gradient", entering
        for layer in range(layers):
            s = Size(samples, size, size, channels, 4 * growth, growth)
            yield from ((op, s) for op in ops)
            if training:
                earlier = channels - growth if layer and not keep_bottleneck else 0
                yield "bottleneck_backward", replace(s, earlier=earlier)
                if layer + 1 == layers and not keep_bottleneck:
                    yield "bottleneck_forward", s
            channels += growth
        last = i + 1 == len(spec.layers)
        s = Size(samples, size, size, channels, outputs=0 if last else channels // 2)
        yield from ((f"{'head' if last else 'transition'}_{direction}", s) for direction in directions)
        if not last:
            size, channels = size // 2, s.outputs


def step_bytes(spec, keep_bottleneck=False, training=True):
    """Bytes of a fused training step (forward, backward with the bottlenecks computed again unless kept, optimizer), or of
    inference.

    The first convolution is counted as PyTorch computes it; everything else by the formulas above.
    """
    e = STORAGE_BYTES[spec.dtype]
    total = stem_bytes(spec, training) + sum(op_bytes(op, s, e) for op, s in step_ops(spec, keep_bottleneck, training))
    return total + (optimizer_bytes(spec) if training else 0)


def optimizer_bytes(spec):
    """Bytes of SGD: weight, gradient and momentum read, two of them written."""
    return 5 * parameters(spec) * ARITHMETIC_BYTES


def parameters(spec):
    """Weights of the convolutions after the stem and of the classifier: all but a few."""
    total = 0
    for op, s in step_ops(spec, training=False):
        if op == "conv3x3_forward":
            total += 9 * s.bottleneck * s.growth
        elif op in ("bottleneck_forward", "transition_forward", "head_forward"):
            total += s.channels * (s.bottleneck or s.outputs or spec.num_classes)
    return total


def step_flops(spec, training=True):
    """Operations of the plain network's convolutions and classifier, computed directly: forward and both gradients.

    torch.utils.flop_counter counts as many. A transition's convolution comes before its pooling here; the images need no
    gradient.
    """
    times, total = 3 if training else 1, 0
    for op, s in step_ops(spec, True, training=False):
        if op == "transition_forward":
            total += 2 * s.rows * s.channels * s.outputs
        elif op == "squeeze_excite_forward":
            total += 2 * s.samples * 2 * s.growth * max(1, s.growth // 16)
        elif op == "head_forward":
            total += 2 * s.samples * s.channels * spec.num_classes
        else:
            total += op_flops(op, s)
    return times * total + (times - training) * stem_flops(spec)


def stem_flops(spec):
    """Operations of the first convolution in one direction."""
    side, kernel = (spec.size, 3) if spec.small_inputs else (spec.size // 2, 7)
    return 2 * spec.batch_size * side**2 * kernel**2 * 3 * spec.stem_channels


def stem_bytes(spec, training=True):
    """Bytes of the first convolution: forward, and the gradient of the weight."""
    side = spec.size if spec.small_inputs else spec.size // 2
    values = spec.batch_size * (spec.size**2 * 3 + side**2 * spec.stem_channels)
    return values * STORAGE_BYTES[spec.dtype] * (1 + training)
