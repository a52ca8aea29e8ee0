"""Noise: plain PyTorch with every intermediate value a little off shows how far rounding may move each result.

Some results of a network are mere rounding errors: the gradient of a weight whose scale a norm cancels is 0 except for
rounding; a norm of two values a channel returns 1 and -1 and lets hardly any gradient through; values that are almost
equal are blown up by 1/sqrt(eps). In such results two right implementations differ by a multiple of the rounding of the
terms of a sum, which may be many times the result. Noise measures this: it multiplies the inputs and outputs of each
operation, and their gradients, by 1 + level * u with u uniform in [-1, 1]. Norms are written out for it, because values
cancel inside of a norm.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Blur(torch.autograd.Function):
    """x * (1 + level * u); in backward the gradient is multiplied by 1 + level * u with another u."""

    @staticmethod
    def forward(ctx, x, noise):
        ctx.noise = noise
        return noise.factors(x) * x

    @staticmethod
    def backward(ctx, grad):
        return ctx.noise.factors(grad) * grad, None


class Noise(TorchFunctionMode):
    """A context in which convolutions, products and norms have noise of a level; masks are the same as without."""

    def __init__(self, level: float, seed: int):
        super().__init__()
        self.level = level
        self.generator = torch.Generator().manual_seed(seed)

    def factors(self, x: Tensor) -> Tensor:
        return 1 + self.level * (2 * torch.rand(x.shape, generator=self.generator, dtype=x.dtype) - 1)

    def blur(self, x):
        return _Blur.apply(x, self) if isinstance(x, Tensor) and x.is_floating_point() else x

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.batch_norm and args[0].numel():
            return self.batch_norm(*args, **kwargs)
        if func in (F.conv2d, F.linear, Tensor.mul):
            return self.blur(func(*map(self.blur, args), **kwargs))
        return func(*args, **kwargs)

    def batch_norm(self, x, running_mean, running_var, weight, bias, training, momentum, eps):
        blur, size, each = self.blur, x.shape, (1, -1, 1, 1)
        x = blur(x)
        if training:
            mean = blur(x.mean((0, 2, 3), keepdim=True).expand(size))
            var = blur(blur(x - mean).square()).mean((0, 2, 3), keepdim=True)
            if running_mean is not None:
                values = x.numel() // x.shape[1]
                with torch.no_grad():
                    running_mean.lerp_(mean[:1, :, :1, :1].flatten(), momentum)
                    running_var.lerp_(var.flatten() * (values / (values - 1)), momentum)
        else:
            mean, var = blur(running_mean.view(each).expand(size)), running_var.view(each)
        y = blur(blur(x - mean) * blur((var + eps).rsqrt().expand(size)))
        if weight is not None:
            y = blur(y * blur(weight.view(each).expand(size))) + blur(bias.view(each).expand(size))
        return blur(y)
