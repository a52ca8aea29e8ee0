"""Compositions of PyTorch's operators that users would write in place of each kernel op, on random tensors.

Forward compositions run without gradients; a backward one is what autograd does for the forward one, all gradients of it.
Concatenations are of a layer's real parts. A fused op does a little more than its composition here (it also takes moments
for later norms, and adds into the gradient buffer); the plain network does that elsewhere.
"""

import torch
import torch.nn.functional as F

from bench.kernel_arguments import new_arguments
from densenet_ext import reference

_FORWARD = {
    "bottleneck": "cat, batch_norm, relu_, conv2d 1x1",
    "conv3x3": "batch_norm, relu_, conv2d 3x3",
    "squeeze_excite": "adaptive_avg_pool2d, conv2d, relu, conv2d, sigmoid, mul",
    "transition": "batch_norm, relu_, conv2d 1x1, avg_pool2d",
    "head": "batch_norm, relu_, adaptive_avg_pool2d",
    "stem": "batch_norm, relu_, max_pool2d 3x3",
}
# The operators of each composition, for the notes under the table.
COMPOSITIONS = {
    "append": "copy_ into a slice, var_mean",
    "fold_norm": "the formulas on tables, a dozen small operators",
    "finish_gradient": "mul, add, mul, add, copy_",
    **{f"{name}_forward": operators for name, operators in _FORWARD.items()},
    **{f"{name}_backward": f"autograd of {operators}" for name, operators in _FORWARD.items()},
}


class Composition:
    """Compositions for one size, type and layout: `function(op)` is what to call."""

    def __init__(self, size, dtype, channels_last):
        self.size, self.dtype = size, dtype
        self.format = torch.channels_last if channels_last else torch.contiguous_format

    def function(self, op):
        if op == "append":
            return self.append()
        if op in ("fold_norm", "finish_gradient"):
            arguments = new_arguments(op, self.size, self.dtype, "cpu")
            return lambda: getattr(reference, op)(*arguments)
        name, direction = op.rsplit("_", 1)
        inputs, forward = getattr(self, name)()
        if direction == "forward":
            return torch.no_grad()(lambda: forward(*inputs))
        inputs = [x.requires_grad_() for x in inputs]
        output = forward(*inputs)  # autograd's graph is made once
        gradient = torch.randn_like(output)
        return lambda: torch.autograd.grad(output, inputs, gradient, retain_graph=True)

    def maps(self, channels):
        s = self.size
        return self.tensor(s.samples, channels, s.height, s.width).contiguous(memory_format=self.format)

    def tensor(self, *shape, scale=1.0):
        return torch.randn(shape).mul_(scale).to(self.dtype)

    def weight(self, outputs, inputs, kernel=1):
        weight = self.tensor(outputs, inputs, kernel, kernel, scale=0.1)
        return weight.contiguous(memory_format=self.format)

    def norm(self, channels):
        return torch.randn(channels), torch.randn(channels)

    def append(self):
        x, buffer = self.maps(self.size.channels), self.maps(self.size.total or self.size.channels)
        slot = buffer[:, : self.size.channels]
        return lambda: (slot.copy_(x), torch.var_mean(x, (0, 2, 3)))

    def bottleneck(self):
        """It reads the parts that a layer really has: the block's input and each earlier layer's output."""
        c, k = self.size.channels, self.size.growth
        layers = max(0, (c - 1) // k - 1)
        parts = [self.maps(c - layers * k), *(self.maps(k) for _ in range(layers))]
        inputs = [*self.norm(c), self.weight(self.size.bottleneck, c), *parts]
        return inputs, lambda w, b, conv, *parts: F.conv2d(norm_relu(torch.cat(parts, 1), w, b), conv)

    def conv3x3(self):
        width = self.size.bottleneck
        inputs = [*self.norm(width), self.weight(self.size.growth, width, 3), self.maps(width)]
        return inputs, lambda w, b, conv, x: F.conv2d(norm_relu(x, w, b), conv, padding=1)

    def squeeze_excite(self):
        k, hidden = self.size.growth, max(1, self.size.growth // 16)
        inputs = [self.weight(hidden, k), self.tensor(hidden), self.weight(k, hidden), self.tensor(k), self.maps(k)]

        def forward(fc1, bias1, fc2, bias2, x):
            return x * F.conv2d(F.relu(F.conv2d(F.adaptive_avg_pool2d(x, 1), fc1, bias1)), fc2, bias2).sigmoid()

        return inputs, forward

    def transition(self):
        c = self.size.channels
        inputs = [*self.norm(c), self.weight(self.size.outputs, c), self.maps(c)]
        return inputs, lambda w, b, conv, x: F.avg_pool2d(F.conv2d(norm_relu(x, w, b), conv), 2)

    def head(self):
        c = self.size.channels
        return [*self.norm(c), self.maps(c)], lambda w, b, x: F.adaptive_avg_pool2d(norm_relu(x, w, b), 1)

    def stem(self):
        c = self.size.channels
        return [*self.norm(c), self.maps(c)], lambda w, b, x: F.max_pool2d(norm_relu(x, w, b), 3, stride=2, padding=1)


def norm_relu(x, weight, bias):
    return F.relu_(F.batch_norm(x, None, None, weight, bias, training=True))
