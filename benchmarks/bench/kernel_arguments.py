"""Random arguments of every kernel op, as a stage would have them.

Maps are channels last, the layer's channels being the first of a wider feature buffer.
"""

import torch

from densenet_ext._layout import arithmetic_dtype, gradient_dtype, new_features, new_maps, padded_width

EPS = 1e-5


def bind(op, size, dtype, device):
    """A call of the op without arguments."""
    function = getattr(torch.ops.densenet_ext, op).default
    arguments = getattr(Arguments(size, dtype, device), op)()
    return lambda: function(*arguments)


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
        norm = (s.height * s.width, None, None, weight, self.normal(c), eps, False)
        return *self.moments(), *norm, mean, var, *self.table(c)

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
        inputs = (self.rows(), *self.table(s.bottleneck), weight, None, 1.0)
        return *inputs, self.buffer(), s.channels, *self.moments(), True

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
        rest = (self.normal(s.samples, w) for w in (s.growth, len(parameters[0]), s.growth))
        return self.buffer(), s.channels, *self.moments(), *parameters, *rest

    def squeeze_excite_backward(self):
        s, parameters = self.size, self.excite_parameters()
        fc1, _, fc2, _ = parameters
        rest = (self.normal(s.samples, s.growth), self.normal(s.samples, len(fc1)).relu_())
        gate, gradients = self.normal(s.samples, s.growth).sigmoid_(), [torch.empty_like(p) for p in parameters]
        return self.buffer(), self.gradient(), s.channels, fc1, fc2, *rest, gate, self.coefficients(), *gradients

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
