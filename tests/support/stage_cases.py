"""Random arguments of the stage ops, and the stage as plain differentiable PyTorch on the same arguments."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from densenet_ext._protocol import GradientLayout, Options

DROPOUT_SCALE = 1 / 0.7


@dataclass
class Case:
    """Arguments of torch.ops.densenet_ext.dense_stage; `frozen`: 'none', 'all', or 'every second' norm."""

    mask_kind: int = 0
    squeeze_excite: bool = False
    tail: int = 0
    frozen_norms: str = "none"
    samples: int = 2
    in_channels: int = 3
    growth: int = 2
    width: int = 5
    height: int = 3
    breadth: int = 2
    layers: int = 2
    dtype: torch.dtype = torch.float64
    seed: int = 0
    x: torch.Tensor = field(init=False)
    params: list = field(init=False)
    masks: list = field(init=False)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        arithmetic = torch.float64 if self.dtype == torch.float64 else torch.float32

        def normal(*shape, scale=1.0, offset=0.0):
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return (scale * values + offset).to(arithmetic)

        def keep(*shape):
            return torch.rand(shape, generator=generator) > 0.3

        n, k, k2 = self.samples, self.growth, self.width
        self.x = normal(n, self.in_channels, self.height, self.breadth).to(self.dtype)
        self.params, self.masks, widths = [], [], []
        for layer in range(self.layers):
            c = self.in_channels + layer * k
            widths += [c, k2]
            self.params += [normal(c, offset=1), normal(c), normal(k2, c, 1, 1, scale=c**-0.5)]
            self.params += [normal(k2, offset=1), normal(k2), normal(k, k2, 3, 3, scale=(9 * k2) ** -0.5)]
            if self.squeeze_excite:
                hidden = max(1, k // 2)
                self.params += [normal(hidden, k, 1, 1), normal(hidden, offset=0.5), normal(k, hidden, 1, 1), normal(k)]
            channel_masks = [(1, (n, c)), (2, (n, c)), (4, (n, k2))]
            self.masks += [
                (keep(*size) * DROPOUT_SCALE).to(arithmetic) for bit, size in channel_masks if self.mask_kind & bit
            ]
            self.masks += [keep(n, k, self.height, self.breadth)] if self.mask_kind & 8 else []
            self.masks += [(keep(n, k) * DROPOUT_SCALE).to(arithmetic)] if self.mask_kind & 16 else []
        channels = self.in_channels + self.layers * k
        if self.tail:
            widths.append(channels)
            self.params += [normal(channels, offset=1), normal(channels)]
        if self.tail == 1:
            self.params.append(normal(3, channels, 1, 1, scale=channels**-0.5))
        self.frozen = [{"none": 0, "all": 1, "every second": i % 2}[self.frozen_norms] for i in range(len(widths))]
        self.frozen_stats = []
        for width, frozen in zip(widths, self.frozen, strict=True):
            self.frozen_stats += [normal(width), normal(width).square() + 0.2] if frozen else []
        self.eps = [1e-5 * (i + 1) for i in range(len(widths))]

    def to(self, device):
        """This case with its tensors on a device."""
        self.x = self.x.to(device)
        for tensors in (self.params, self.masks, self.frozen_stats):
            tensors[:] = [t.to(device) for t in tensors]
        return self

    def options(self, keep_bottleneck=False):
        """keep_bottleneck: True, False, or how many of the last layers keep theirs."""
        return Options(
            mask_kind=self.mask_kind,
            squeeze_excite=int(self.squeeze_excite),
            tail=self.tail,
            kept_bottlenecks=self.layers if keep_bottleneck is True else int(keep_bottleneck),
        )

    def numbers(self, keep_bottleneck=False):
        """The arguments that every op takes after its tensors."""
        return self.eps, self.frozen, DROPOUT_SCALE, [*self.options(keep_bottleneck)]

    def args(self, x=None, params=None, keep_bottleneck=False):
        """The arguments of dense_stage."""
        x, params = self.x if x is None else x, self.params if params is None else params
        return x, params, self.masks, self.frozen_stats, *self.numbers(keep_bottleneck)

    def backward_args(self, grad, features, state, layout=GradientLayout.DEVICE, keep_bottleneck=False):
        """The arguments of dense_stage_backward; state: stats, gates and bottlenecks of the forward pass."""
        numbers = (*self.numbers(keep_bottleneck), self.in_channels, layout)
        return grad, features, self.params, self.masks, *state, *numbers

    def fused(self, x=None, params=None, keep_bottleneck=False):
        """The output of the compiled op."""
        return torch.ops.densenet_ext.dense_stage(*self.args(x, params, keep_bottleneck))[0]

    def layer_args(self, inputs, params=None, keep_bottleneck=False):
        """The arguments of dense_layer, for a case with one layer and no tail."""
        params = self.params if params is None else params
        return inputs, params, self.masks, self.frozen_stats, *self.numbers(keep_bottleneck)

    def plain(self, x=None, params=None):
        """The output as a graph of ordinary differentiable functions."""
        params = list(self.params if params is None else params)
        norms = iter(zip(self.eps, self.frozen, strict=True))
        masks, statistics = iter(self.masks), iter(self.frozen_stats)
        each = 10 if self.squeeze_excite else 6

        def norm_relu(x, weight, bias):
            eps, frozen = next(norms)
            mean, var = (next(statistics), next(statistics)) if frozen else (None, None)
            return F.relu(F.batch_norm(x, mean, var, weight, bias, not frozen, 0.0, eps))

        def masked(x, bit):
            return x * next(masks)[:, :, None, None] if self.mask_kind & bit else x

        features = self.x if x is None else x
        for layer in range(self.layers):
            weight1, bias1, conv1, weight2, bias2, conv2, *excite = params[layer * each : (layer + 1) * each]
            z = norm_relu(masked(features, 1), weight1, bias1)
            b = F.conv2d(masked(z, 2), conv1)
            y = F.conv2d(masked(norm_relu(b, weight2, bias2), 4), conv2, padding=1)
            if self.mask_kind & 8:
                y = torch.where(next(masks), y * DROPOUT_SCALE, 0.0)
            y = masked(y, 16)
            if excite:
                hidden = F.relu(F.conv2d(y.mean((2, 3), keepdim=True), excite[0], excite[1]))
                y = y * F.conv2d(hidden, excite[2], excite[3]).sigmoid()
            features = torch.cat([features, y], 1)
        tail = params[self.layers * each :]
        if self.tail == 1:
            features = F.avg_pool2d(F.conv2d(norm_relu(features, *tail[:2]), tail[2]), 2)
        if self.tail == 2:
            features = norm_relu(features, *tail).mean((2, 3))
        return features

    def leaves(self):
        """Copies of x and params that require gradients."""
        return self.x.clone().requires_grad_(), [p.clone().requires_grad_() for p in self.params]
