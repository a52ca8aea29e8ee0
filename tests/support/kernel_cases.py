"""Random arguments of every kernel op, on grids where no rounding can change the sign before a rectifier.

x is a multiple of 1/8, a scale a multiple of 1/8 and a shift an odd multiple of 1/128: scale * x + shift is exact in
float32 and never 0, so that a kernel in any dtype and the twin in float64 rectify the same values.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from densenet_ext._layout import arithmetic_dtype, gradient_dtype, is_channels_last, padded_width, pixel_pitch
from densenet_ext._ops import handles

EPS = 1e-3
# Kernels can be tested on these devices. (If CUDA is simulated, the CUDA kernels serve tensors on "cpu".)
DEVICES = [
    device for device in ("cpu", "cuda") if device in handles.DEVICES and (device == "cpu" or torch.cuda.is_available())
]


@dataclass(frozen=True)
class Shape:
    """N samples of H x W pixels, c channels read, bottleneck width K2, growth rate k; `why` this shape is tested."""

    why: str
    samples: int = 2
    height: int = 6
    width: int = 5
    channels: int = 16
    bottleneck: int = 16
    growth: int = 4
    outputs: int = 8

    def __str__(self):
        return self.why.replace(" ", "-")


SHAPES = [
    Shape("channels no multiple of 16", channels=13, bottleneck=20, growth=5, outputs=7),
    Shape("growth 1", channels=3, bottleneck=4, growth=1, outputs=1),
    Shape("one pixel", samples=3, height=1, width=1),
    Shape("one row", height=1, width=37),
    Shape("one sample", samples=1, height=4, width=4),
    Shape("empty batch", samples=0),
    Shape("7x7", samples=3, height=7, width=7, channels=40, bottleneck=48, growth=12),
    Shape("14x14", height=14, width=14, channels=33, bottleneck=128, growth=32, outputs=16),
    Shape("no multiples of 16, growth of more than 16", height=9, width=7, channels=20, bottleneck=100, growth=22),
    Shape("growth of more than 16 and few channels", height=5, width=9, channels=12, bottleneck=40, growth=20),
    Shape("bottleneck of more than 128", height=5, width=5, channels=24, bottleneck=160, growth=40),
    Shape("more than 128 channels", height=7, width=6, channels=150, bottleneck=48, growth=12, outputs=75),
    Shape("two columns and many rows", height=41, width=2, channels=4),
    Shape("33x31", height=33, width=31, channels=24, bottleneck=48, growth=12, outputs=12),
    Shape("32x32 of more pixels than a tile", samples=3, height=32, width=32, channels=60, bottleneck=48, growth=12),
    Shape("56x56 in blocks of rows", height=56, width=56, channels=32, bottleneck=128, growth=32, outputs=40),
]


class Problem:
    """Arguments for one shape and storage dtype: tensors of the shapes that the twins document.

    masks: 'none'; 'pre': before the norm, so that scale differs from sample to sample; 'all': also after the norm, so
    that shift differs, too, and dropout. Buffers have two more channels than are used, and gaps between planes (or
    between their pixels, if they are channels last); all of these hold NaN. Tensors are created on the CPU, with the
    layout and the dtypes of the device; `to_device` moves them there.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, masks: str = "none", seed: int = 0, device: str = "cpu"):
        self.shape, self.dtype, self.masks = shape, dtype, masks
        self.arithmetic = arithmetic_dtype(dtype)
        on_device = torch.empty(0, dtype=dtype, device=device)
        self.channels_last, self.gradient = is_channels_last(on_device), gradient_dtype(on_device)
        self.generator = torch.Generator().manual_seed(seed)
        self.rows = shape.samples * shape.height * shape.width

    def grid(self, *shape, step=8, limit=24, odd=False):
        """Random multiples of 1/step up to limit/step, odd multiples if asked for."""
        values = torch.randint(-limit, limit + 1, shape, generator=self.generator).double()
        return (2 * values + 1) / step if odd else values / step

    def normal(self, *shape, scale=1.0):
        return (scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)).to(self.arithmetic)

    def mask(self, *shape):
        return ((torch.rand(shape, generator=self.generator) > 0.3).double() / 0.5).to(self.arithmetic)

    def new(self, *shape, dtype=None):
        """An output, full of NaN."""
        return torch.full(shape, torch.nan, dtype=dtype or self.arithmetic)

    def buffer(self, channels, dtype=None, offset=0, values=True):
        """A feature or gradient buffer with values in `channels` channels from offset on; NaN everywhere else."""
        s, gap, dtype = self.shape, 3, dtype or self.dtype
        pixels, total = s.height * s.width, offset + channels + 2
        if self.channels_last:
            base = self.new(s.samples, s.height, s.width, pixel_pitch(total + gap, dtype), dtype=dtype)
            maps = base[..., :total].permute(0, 3, 1, 2)
        else:
            base = self.new(s.samples, total, pixels + gap, dtype=dtype)
            maps = base[:, :, :pixels].unflatten(2, (s.height, s.width))
        if values:
            maps[:, offset : offset + channels] = self.grid(s.samples, channels, s.height, s.width).to(dtype)
        return maps

    def maps(self, channels, height, width, channels_last=False):
        """An output without gaps, full of NaN, in the device's layout or, if asked for, channels last."""
        if self.channels_last or channels_last:
            return self.new(self.shape.samples, height, width, channels, dtype=self.dtype).permute(0, 3, 1, 2)
        return self.new(self.shape.samples, channels, height, width, dtype=self.dtype)

    def scale_shift(self, channels, pre_mask=None, post_mask=None):
        """Scale and shift [1 or N, channels]; masks multiply their rows."""
        scale, shift = self.grid(1, channels, limit=16), self.grid(1, channels, step=128, limit=100, odd=True)
        scale, shift = scale.to(self.arithmetic), shift.to(self.arithmetic)
        for mask in (pre_mask, post_mask):
            scale = scale if mask is None else scale * mask
        return scale, shift if post_mask is None else shift * post_mask

    def norm(self, channels, training=True):
        """The arguments norm weight, batch mean, batch variance, eps and training."""
        weight, mean = self.normal(channels), self.normal(channels)
        return weight, mean, self.normal(channels).square() + 0.1, EPS, training

    @cached_property
    def pre_mask(self):
        return self.mask(self.shape.samples, self.shape.channels) if self.masks != "none" else None

    @cached_property
    def post_mask(self):
        return self.mask(self.shape.samples, self.shape.channels) if self.masks == "all" else None

    def dropout(self):
        s = self.shape
        if self.masks != "all":
            return None, 1.0
        return torch.rand((s.samples, s.growth, s.height, s.width), generator=self.generator) > 0.3, 1 / 0.7

    def bottleneck(self):
        values = torch.zeros(self.rows, padded_width(self.shape.bottleneck), dtype=torch.float64)
        values[:, : self.shape.bottleneck] = self.grid(self.rows, self.shape.bottleneck)
        return values.to(self.dtype)

    def excite_parameters(self):
        k, hidden = self.shape.growth, max(1, self.shape.growth // 2)
        return self.normal(hidden, k), self.normal(hidden), self.normal(k, hidden), self.normal(k)

    # ---- one method a kernel op: its arguments ----------------------------------------------------------------------

    def append(self, channels_last=False):
        s = self.shape
        x = self.maps(s.growth, s.height, s.width, channels_last).copy_(
            self.grid(s.samples, s.growth, s.height, s.width)
        )
        columns = (s.samples, s.channels + s.growth + 2)
        return x, self.buffer(s.channels + s.growth, values=False), s.channels, self.new(*columns), self.new(*columns)

    def fold_norm(self, has_statistics=False):
        s = self.shape
        rows = s.samples
        moments = self.normal(rows, s.channels + 2), self.normal(rows, s.channels + 2).square() * 40
        weight, mean, var, eps, _ = self.norm(s.channels)
        statistics = (mean, var) if has_statistics else (self.new(s.channels), self.new(s.channels))
        scale_shift = [self.new(1 if mask is None else rows, s.channels) for mask in (self.pre_mask, self.post_mask)]
        pixels = s.height * s.width
        masks = (self.pre_mask, self.post_mask)
        return *moments, pixels, *masks, weight, self.normal(s.channels), eps, has_statistics, *statistics, *scale_shift

    def bottleneck_forward(self, moments=True):
        s = self.shape
        weight = self.normal(s.bottleneck, s.channels, 1, 1, scale=0.1)
        out = self.new(self.rows, padded_width(s.bottleneck), dtype=self.dtype)
        mean, m2 = (self.new(1, s.bottleneck), self.new(1, s.bottleneck)) if moments else (None, None)
        features = self.buffer(s.channels)
        scale_shift = self.scale_shift(s.channels, self.pre_mask, self.post_mask)
        return features, *scale_shift, weight, out, mean, m2

    def conv3x3_forward(self, moments=True):
        s = self.shape
        weight = self.normal(s.growth, s.bottleneck, 3, 3, scale=0.1)
        features = self.buffer(s.channels + s.growth, values=False)
        columns = (s.samples, s.channels + s.growth + 2)
        mean, m2 = (self.new(*columns), self.new(*columns)) if moments else (None, None)
        post_mask = self.mask(s.samples, s.bottleneck) if self.masks == "all" else None
        scale_shift = self.scale_shift(s.bottleneck, None, post_mask)
        return self.bottleneck(), *scale_shift, weight, *self.dropout(), features, s.channels, mean, m2

    def squeeze_excite_forward(self):
        s = self.shape
        features = self.buffer(s.growth, offset=s.channels)
        flat = features[:, s.channels : s.channels + s.growth].flatten(2).to(self.arithmetic)
        moments = [self.new(s.samples, s.channels + s.growth + 2) for _ in range(2)]
        moments[0][:, s.channels : s.channels + s.growth] = flat.mean(2)
        moments[1][:, s.channels : s.channels + s.growth] = (flat - flat.mean(2, keepdim=True)).square().sum(2)
        fc1, bias1, fc2, bias2 = self.excite_parameters()
        outputs = self.new(s.samples, s.growth), self.new(s.samples, len(fc1)), self.new(s.samples, s.growth)
        return features, s.channels, *moments, fc1, bias1, fc2, bias2, *outputs

    def squeeze_excite_backward(self):
        s = self.shape
        fc1, bias1, fc2, bias2 = self.excite_parameters()
        hidden = torch.relu(self.normal(s.samples, len(fc1)))
        saved = self.normal(s.samples, s.growth), hidden, self.normal(s.samples, s.growth).sigmoid()
        coef = self.normal(3, s.samples, s.channels + s.growth + 2)
        features = self.buffer(s.growth, offset=s.channels)
        grad = self.buffer(s.growth, self.gradient, offset=s.channels)
        grads = [torch.full_like(p, torch.nan) for p in (fc1, bias1, fc2, bias2)]
        return features, grad, s.channels, fc1, fc2, *saved, coef, *grads

    def conv3x3_backward(self, training=True):
        s = self.shape
        weight = self.normal(s.growth, s.bottleneck, 3, 3, scale=0.1)
        features = self.buffer(s.growth, offset=s.channels)
        grad = self.buffer(s.growth, self.gradient, offset=s.channels)
        coef = self.normal(3, s.samples, s.channels + s.growth + 2)
        post_mask = self.mask(s.samples, s.bottleneck) if self.masks == "all" else None
        scale_shift = self.scale_shift(s.bottleneck, None, post_mask)
        outputs = (
            self.new(self.rows, padded_width(s.bottleneck), dtype=self.gradient),
            torch.full_like(weight, torch.nan),
            self.new(s.bottleneck),
            self.new(s.bottleneck),
            self.new(3, s.bottleneck),
        )
        inputs = (self.bottleneck(), *scale_shift, post_mask, weight, *self.dropout(), features, grad, coef, s.channels)
        return *inputs, *self.norm(s.bottleneck, training), *outputs

    def bottleneck_backward(self, training=True, grad_in="none", previous=False):
        """grad_in: 'none', the 'same' tensor as grad, or an 'other'; previous: with the previous layer's bottleneck."""
        s = self.shape
        weight = self.normal(s.bottleneck, s.channels, 1, 1, scale=0.1)
        db_affine = self.normal(3, s.bottleneck)
        scale, shift = self.scale_shift(s.channels, self.pre_mask, self.post_mask)
        dv = self.normal(self.rows, padded_width(s.bottleneck)).to(self.gradient)
        dv[:, s.bottleneck :] = 0
        grad = self.buffer(s.channels, self.gradient, values=grad_in == "same")
        incoming = {"none": None, "same": grad, "other": self.buffer(s.channels, self.gradient)}[grad_in]
        coef = self.normal(3, s.samples, s.channels + 2)
        outputs = (grad, coef, torch.full_like(weight, torch.nan), self.new(s.channels), self.new(s.channels))
        masks = (self.pre_mask, self.post_mask)
        inputs = (self.buffer(s.channels), scale, shift, *masks, weight, dv, self.bottleneck(), db_affine)
        previous_layer = self._previous_layer() if previous else (None, None, None)
        return *inputs, *self.norm(s.channels, training), incoming, *outputs, *previous_layer

    def _previous_layer(self):
        """Scale, shift and weight of a layer that reads fewer channels."""
        channels = max(1, self.shape.channels - self.shape.growth)
        masks = [mask if mask is None else mask[:, :channels] for mask in (self.pre_mask, self.post_mask)]
        return *self.scale_shift(channels, *masks), self.normal(self.shape.bottleneck, channels, 1, 1, scale=0.1)

    def _whole(self, values=True, dtype=None):
        """A buffer whose channels are all used, with gaps between its planes."""
        return self.buffer(self.shape.channels, dtype, values=values)[:, : self.shape.channels]

    def transition_forward(self):
        s = self.shape
        weight = self.normal(s.outputs, s.channels, 1, 1, scale=0.1)
        out = self.maps(s.outputs, s.height // 2, s.width // 2)
        return self._whole(), *self.scale_shift(s.channels), weight, out

    def transition_backward(self, training=True):
        s = self.shape
        features, scale, shift, weight, out = self.transition_forward()
        grad_out = self.grid(*out.shape).to(self.dtype)
        return *(features, scale, shift, weight, *self.norm(s.channels, training), grad_out), *self._gradients(weight)

    def head_forward(self):
        s = self.shape
        return self._whole(), *self.scale_shift(s.channels), self.new(s.samples, s.channels, dtype=self.dtype)

    def head_backward(self, training=True):
        features, scale, shift, out = self.head_forward()
        grad_out = self.grid(*out.shape).to(self.dtype)
        return features, scale, shift, *self.norm(self.shape.channels, training), grad_out, *self._gradients()

    def _gradients(self, *weights):
        s = self.shape
        grad, coef = self._whole(False, self.gradient), self.new(3, s.samples, s.channels)
        return grad, coef, *[torch.full_like(w, torch.nan) for w in weights], self.new(s.channels), self.new(s.channels)

    def _stem_norm(self):
        """Norm weight, bias, mean, variance and eps that make scale and shift exact, and shift no multiple of x."""
        c = self.shape.channels
        weight, bias = (row[0] for row in self.scale_shift(c))
        return weight, bias, self.grid(c).to(self.arithmetic), torch.full((c,), 0.75, dtype=self.arithmetic), 0.25

    def stem_forward(self, has_statistics=False):
        s = self.shape
        weight, bias, mean, var, eps = self._stem_norm()
        statistics = (mean, var) if has_statistics else (self.new(s.channels), self.new(s.channels))
        return self._stem_input(), weight, bias, eps, has_statistics, *statistics, self._stem_maps()

    def _stem_input(self, values=True):
        s = self.shape
        maps = self.maps(s.channels, s.height, s.width, channels_last=True)
        return maps.copy_(self.grid(*maps.shape)) if values else maps

    def _stem_maps(self):
        return self.maps(self.shape.channels, (self.shape.height + 1) // 2, (self.shape.width + 1) // 2)

    def stem_backward(self, training=True, need_dx=True):
        s = self.shape
        grad_out = self._stem_maps()
        grad_out.copy_(self.grid(*grad_out.shape))
        dx = self._stem_input(values=False) if need_dx else None
        return (
            self._stem_input(),
            *self._stem_norm(),
            training,
            grad_out,
            dx,
            self.new(s.channels),
            self.new(s.channels),
        )

    def finish_gradient(self, channels_last=False):
        s = self.shape
        features = self.buffer(s.growth, offset=s.channels)
        grad = self.buffer(s.growth, self.gradient, offset=s.channels)
        coef = self.normal(3, s.samples, s.channels + s.growth + 2)
        return features, grad, coef, s.channels, self.maps(s.growth, s.height, s.width, channels_last)


def to_device(args, device):
    """Move arguments to a device, with their strides and the contents of gaps; equal tensors stay one tensor."""
    moved = {}

    def move(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in moved:
            base = value if value._base is None else value._base
            on_device = base.to(device, copy=True)
            if value._base is not None:
                on_device = on_device.as_strided(value.shape, value.stride(), value.storage_offset())
            moved[id(value)] = on_device
        return moved[id(value)]

    return [move(value) for value in args]
