"""How far rounding may move each result of a network: plain PyTorch, every intermediate value of it a little off.

Some results of a network say nothing about its numbers: the gradient of a weight whose scale a norm takes out again is 0
but for rounding; a norm of two values a channel returns 1 and -1 and lets hardly any gradient through; values that are
all but equal are blown up by 1/sqrt(eps). Two right implementations differ there by a multiple of the rounding of what
is summed, which may be many times the result. Noise shows that: it multiplies what goes into and comes out of each
operation by 1 + level * u, u uniform in [-1, 1], and likewise the gradients there. Norms are written out for it, because
only inside of a norm can be seen what cancels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Blur(torch.autograd.Function):
    """x * (1 + level * u); its gradient times (1 + level * u) with other u."""

    @staticmethod
    def forward(ctx, x, noise):
        ctx.noise = noise
        return noise.factors(x) * x

    @staticmethod
    def backward(ctx, grad):
        return ctx.noise.factors(grad) * grad, None


class Noise(TorchFunctionMode):
    """Inside, convolutions, products and norms have noise of that level; masks are drawn as without."""

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
