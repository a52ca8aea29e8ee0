"""Time of every kernel op alone, against the bytes it has to move and the operations it has to do.

Arguments are random and lie as a stage would have them: channels last, the layer's channels being the first of a wider
feature buffer. A time is the median of many calls, each with nothing of its data in the cache (gpu_device.py). Beside it
stands what the host takes to queue the call: where that is longer, a step is bound by launches.
"""

import statistics
import time
from dataclasses import dataclass

import harness
import torch
from gpu_device import ceilings
from roofline import STORAGE_BYTES, Size, floor_seconds, op_bytes, op_flops

from densenet_ext._layout import arithmetic_dtype, gradient_dtype, new_features, new_maps, padded_width

EPS = 1e-5
JOINT = ("bottleneck_forward", "bottleneck_backward")
LAYER = (*JOINT, "conv3x3_forward", "conv3x3_backward")
EXCITE = ("squeeze_excite_forward", "squeeze_excite_backward")
TRANSITION = ("append", "fold_norm", "transition_forward", "transition_backward", "finish_gradient")
HEAD = ("head_forward", "head_backward")
STEM = ("stem_forward", "stem_backward")


@dataclass(frozen=True)
class Case:
    net: str
    size: Size
    ops: tuple

    @property
    def name(self):
        s = self.size
        return f"{self.net} {s.height}x{s.width} N{s.samples} C{s.channels}"


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


def choose_cases(tiny):
    """The layers of DenseNet-BC(100, k=12) and of DenseNet-121: three where the bytes are, one elsewhere."""
    if tiny:
        return [
            *layer_cases("cifar", 2, 8, 24, (8, 20), 16, 4, excite=EXCITE, consumer=TRANSITION, outputs=12),
            *layer_cases("densenet121", 2, 4, 40, (32,), 32, 8, consumer=HEAD),
            Case("densenet121", Size(2, 8, 8, 8, total=8), STEM),
        ]
    cifar = {"width": 48, "growth": 12}
    imagenet = {"width": 128, "growth": 32}
    return [
        *layer_cases("densenet121", 256, 56, 256, (64, 128, 224), **imagenet, consumer=TRANSITION, outputs=128),
        Case("densenet121", Size(256, 112, 112, 64, total=64), STEM),
        *layer_cases("cifar", 64, 32, 216, (24, 120, 204), **cifar, excite=EXCITE, consumer=TRANSITION, outputs=108),
        *layer_cases("cifar", 256, 32, 216, (24, 120, 204), **cifar, excite=EXCITE, consumer=TRANSITION, outputs=108),
        *layer_cases("densenet121", 256, 14, 1024, (256, 640, 992), **imagenet),
        *layer_cases("densenet121", 256, 28, 512, (320,), **imagenet),
        *layer_cases("densenet121", 256, 7, 1024, (992,), **imagenet, consumer=HEAD),
        *layer_cases("cifar", 256, 16, 300, (204,), **cifar),
        *layer_cases("cifar", 256, 8, 342, (246,), **cifar, consumer=HEAD),
    ]


class Arguments:
    """Random tensors for one size and storage type, on one device; one method an op, its arguments in the op's order."""

    def __init__(self, size, dtype, device):
        self.size, self.device = size, device
        self.dtype, self.arithmetic = dtype, arithmetic_dtype(dtype)
        self.like = torch.empty(size.samples, 1, size.height, size.width, dtype=dtype, device=device)

    def normal(self, *shape, scale=1.0, dtype=None):
        return torch.randn(shape, device=self.device, dtype=dtype or self.arithmetic).mul_(scale)

    def buffer(self, dtype=None):
        return new_features(self.like, self.size.total, dtype).normal_()

    def gradient(self):
        return self.buffer(gradient_dtype(self.like))

    def rows(self):
        return self.normal(self.size.rows, padded_width(self.size.bottleneck), dtype=self.dtype)

    def table(self, channels):
        return self.normal(1, channels), self.normal(1, channels)

    def norm(self, channels):
        return self.normal(channels), self.normal(channels), self.normal(channels).square_().add_(0.1), EPS, True

    def coefficients(self):
        return self.normal(3, self.size.samples, self.size.total)

    def moments(self):
        shape = (self.size.samples, self.size.total)
        return self.normal(*shape), self.normal(*shape).square_()

    def append(self):
        s = self.size
        x = new_maps(self.like, s.channels, (s.height, s.width)).normal_()
        return x, self.buffer(), 0, *self.moments()

    def fold_norm(self):
        s, c = self.size, self.size.channels
        weight, mean, var, eps, _ = self.norm(c)
        given = (s.height * s.width, None, None, weight, self.normal(c), eps, False)
        return *self.moments(), *given, mean, var, *self.table(c)

    def bottleneck_forward(self):
        s = self.size
        weight = self.normal(s.bottleneck, s.channels, 1, 1, scale=0.1)
        moments = self.normal(1, s.bottleneck), self.normal(1, s.bottleneck)
        return self.buffer(), *self.table(s.channels), weight, self.rows(), *moments, True

    def bottleneck_backward(self):
        s = self.size
        weight, grad = self.normal(s.bottleneck, s.channels, 1, 1, scale=0.1), self.gradient()
        dv = self.rows().to(gradient_dtype(self.like))
        inputs = (self.buffer(), *self.table(s.channels), None, None, weight, dv, self.rows())
        outputs = (self.coefficients(), torch.empty_like(weight), self.normal(s.channels), self.normal(s.channels))
        earlier = (None, None, None)
        return *inputs, self.normal(3, s.bottleneck), *self.norm(s.channels), grad, grad, *outputs, *earlier, True

    def conv3x3_forward(self):
        s = self.size
        weight = self.normal(s.growth, s.bottleneck, 3, 3, scale=0.1)
        dropout = (None, 1.0)
        return (
            self.rows(),
            *self.table(s.bottleneck),
            weight,
            *dropout,
            self.buffer(),
            s.channels,
            *self.moments(),
            True,
        )

    def conv3x3_backward(self):
        s, k2 = self.size, self.size.bottleneck
        weight = self.normal(s.growth, k2, 3, 3, scale=0.1)
        inputs = (self.rows(), *self.table(k2), None, weight, None, 1.0)
        maps = (self.buffer(), self.gradient(), self.coefficients(), s.channels)
        dv = self.rows().to(gradient_dtype(self.like))
        outputs = (dv, torch.empty_like(weight), self.normal(k2), self.normal(k2), self.normal(3, k2))
        return *inputs, *maps, *self.norm(k2), *outputs, True

    def excite_parameters(self):
        k, hidden = self.size.growth, max(1, self.size.growth // 16)
        return self.normal(hidden, k), self.normal(hidden), self.normal(k, hidden), self.normal(k)

    def squeeze_excite_forward(self):
        s, parameters = self.size, self.excite_parameters()
        saved = (self.normal(s.samples, w) for w in (s.growth, len(parameters[0]), s.growth))
        return self.buffer(), s.channels, *self.moments(), *parameters, *saved

    def squeeze_excite_backward(self):
        s, parameters = self.size, self.excite_parameters()
        fc1, _, fc2, _ = parameters
        saved = (self.normal(s.samples, s.growth), self.normal(s.samples, len(fc1)).relu_())
        gate, gradients = self.normal(s.samples, s.growth).sigmoid_(), [torch.empty_like(p) for p in parameters]
        return self.buffer(), self.gradient(), s.channels, fc1, fc2, *saved, gate, self.coefficients(), *gradients

    def _transition(self):
        s = self.size
        weight = self.normal(s.outputs, s.channels, 1, 1, scale=0.1)
        pooled = new_maps(self.like, s.outputs, (s.height // 2, s.width // 2)).normal_()
        return (self.buffer(), *self.table(s.channels), weight), pooled

    def transition_forward(self):
        inputs, out = self._transition()
        return *inputs, out

    def transition_backward(self):
        inputs, grad_out = self._transition()
        return *inputs, *self.norm(self.size.channels), grad_out, *self._gradients(inputs[3])

    def head_forward(self):
        c = self.size.channels
        return self.buffer(), *self.table(c), self.normal(self.size.samples, c, dtype=self.dtype)

    def head_backward(self):
        c = self.size.channels
        features, scale, shift, grad_out = self.head_forward()
        return features, scale, shift, *self.norm(c), grad_out, *self._gradients()

    def _gradients(self, *weights):
        c = self.size.channels
        gradients = [torch.empty_like(w) for w in weights]
        return self.gradient(), self.coefficients(), *gradients, self.normal(c), self.normal(c)

    def _stem(self):
        s, c = self.size, self.size.channels
        weight, mean, var, eps, training = self.norm(c)
        x = new_maps(self.like, c, (s.height, s.width), channels_last=True).normal_()
        pooled = new_maps(self.like, c, ((s.height + 1) // 2, (s.width + 1) // 2)).normal_()
        return x, (weight, self.normal(c)), (mean, var), eps, training, pooled

    def stem_forward(self):
        x, parameters, statistics, eps, training, pooled = self._stem()
        return x, *parameters, eps, not training, *statistics, pooled

    def stem_backward(self):
        x, parameters, statistics, *rest = self._stem()
        c = self.size.channels
        return x, *parameters, *statistics, *rest, torch.empty_like(x), self.normal(c), self.normal(c)

    def finish_gradient(self):
        s = self.size
        out = new_maps(self.like, s.channels, (s.height, s.width))
        return self.buffer(), self.gradient(), self.coefficients(), 0, out


def measure(device, journal, deadline, tiny):
    """Writes a row for every op of every case; none is begun after `deadline`."""
    found = ceilings(device)
    journal.fact("ceilings", found)
    cells = [(dtype, case, op) for dtype in ("bfloat16", "float32") for case in choose_cases(tiny) for op in case.ops]
    journal.fact("cells", len(cells))
    for dtype, case, op in cells:
        key = f"{op} {case.name} {dtype}"
        if time.monotonic() > deadline:
            journal.note(f"kernels: out of time before {key}")
            return
        cell = {"op": op, "case": case.name, "net": case.net, "dtype": dtype}
        if not journal.begin(key, allow=30, **cell):
            continue
        try:
            row = measure_op(device, op, case.size, dtype, found, runs=2 if tiny else 20)
        except (RuntimeError, TypeError) as error:
            journal.row(key, **cell, error=f"{type(error).__name__}: {str(error).splitlines()[0][:300]}")
            if device.lost():
                raise  # another process takes over
            continue
        journal.row(key, **cell, **row)


def measure_op(device, op, size, dtype, found, runs=20):
    """Seconds of one op with the floor under them: a dict for a row."""
    function = getattr(torch.ops.densenet_ext, op).default
    arguments = getattr(Arguments(size, getattr(torch, dtype), device.name), op)()

    def call():
        function(*arguments)

    for _ in range(3 if runs > 2 else 1):
        call()
    device.synchronize()
    host = _host_seconds(device, call, runs)
    times = [device.seconds_after_flush(call, host) for _ in range(runs)]
    median, low, high = harness.quantiles(times)
    moved, flops = op_bytes(op, size, STORAGE_BYTES[dtype]), op_flops(op, size)
    floor = floor_seconds(moved, flops, found["bandwidth"], found["products"][dtype])
    return {
        "seconds": median,
        "seconds_20": low,
        "seconds_80": high,
        "host_seconds": host,
        "bytes": moved,
        "flops": flops,
        "floor_seconds": floor,
        "of_floor": floor / median,
        "bound": "bytes" if moved / found["bandwidth"] >= flops / found["products"][dtype] else "operations",
    }


def _host_seconds(device, call, runs):
    """What the host takes to queue the call; the device's queue is empty each time, so that it never waits."""
    times = []
    for _ in range(min(runs, 10)):
        device.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    device.synchronize()
    return statistics.median(times)
