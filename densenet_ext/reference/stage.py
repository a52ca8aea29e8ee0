"""The layers of a stage over its feature buffer, forward and backward, composed of kernel ops: what `dense_stage.py`
and `dense_layer.py` share.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from .._constants import MASK_DROPOUT, MASK_PRE_CONV1, MASK_PRE_CONV2, MASK_PRE_NORM
from .._layout import arithmetic_dtype, gradient_dtype, padded_width
from .._ops import sync_batch_norm
from . import backward, forward

TWINS = SimpleNamespace(**{**vars(forward), **vars(backward), **vars(sync_batch_norm)})


class Stage:
    """The flat arguments of an op, taken apart: parameters, masks and norms of each layer, and the sizes."""

    def __init__(self, params, masks, mask_kind, eps, frozen, squeeze_excite, tail, in_channels, x, group, kernels):
        self.group = group
        self.kernels = kernels or TWINS
        each = 10 if squeeze_excite else 6
        extra = (0, 3, 2)[tail]
        self.count = (len(params) - extra) // each
        self.layers = [params[i * each : (i + 1) * each] for i in range(self.count)]
        self.tail_params = params[self.count * each :]
        self.width, self.growth = params[2].size(0), params[5].size(0)
        self.hidden = params[6].size(0) if squeeze_excite else 0
        self.in_channels, self.channels = in_channels, in_channels + self.count * self.growth
        self.samples, self.pixels = x.size(0), x.size(2) * x.size(3)
        self.dtype = arithmetic_dtype(x.dtype)
        self.x = x
        bits = [bit for bit in (MASK_PRE_NORM, MASK_PRE_CONV1, MASK_PRE_CONV2, MASK_DROPOUT) if mask_kind & bit]
        self.masks = [dict(zip(bits, masks[i * len(bits) :], strict=False)) for i in range(self.count)]
        self.eps, self.frozen = eps, frozen
        widths = [w for i in range(self.count) for w in (in_channels + i * self.growth, self.width)]
        widths += [self.channels] if tail else []
        self.ends = [sum(widths[: i + 1]) for i in range(len(widths))]
        self.widths = widths

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.x.new_empty(shape, dtype=dtype or self.dtype)

    def bottleneck(self) -> Tensor:
        return self.empty(self.samples * self.pixels, padded_width(self.width), dtype=self.x.dtype)

    def columns(self, stats: Tensor, norm: int) -> Tensor:
        """View of the mean, the variance, the scale and the shift of that batch normalization."""
        return stats[:, self.ends[norm] - self.widths[norm] : self.ends[norm]]

    def statistics(self, stats: Tensor, norm: int) -> Tensor:
        """View of its mean and its variance."""
        return self.columns(stats, norm)[:2]

    def fold(self, norm, weight, bias, stats, moments=None, pixels=0, pre_mask=None, post_mask=None):
        """Scale and shift of that batch normalization; computes its statistics where moments are given."""
        mean, var = self.statistics(stats, norm)
        given = moments is None or bool(self.frozen[norm])
        scale, shift = self.columns(stats, norm)[2:, None]  # kept for backward unless masks are folded in
        if not (pre_mask is None and post_mask is None):
            scale, shift = self.empty(2, self.samples, self.widths[norm])
        elif moments is None:
            return scale, shift
        source = (mean[None], var[None]) if moments is None else moments
        rest = (weight, bias, self.eps[norm])
        self.kernels.fold_norm(*source, pixels, pre_mask, post_mask, *rest, given, mean, var, scale, shift)
        if self.group >= 0 and not given:
            count = self.samples * self.pixels
            self.kernels.synchronize_statistics(mean, var, count, self.group, stats[0, -1:])
            self.kernels.fold_norm(*source, pixels, pre_mask, post_mask, *rest, True, mean, var, scale, shift)
        return scale, shift

    def local(self, norm: int) -> bool:
        """Whether the statistics of that norm come from this process's batch alone."""
        return not self.frozen[norm] and self.group < 0

    def finish_norm_backward(self, norm, dweight, dbias, weight, stats, pre_mask, coef) -> None:
        """What shared statistics add to the gradient of that norm's input."""
        if self.group >= 0 and not self.frozen[norm]:
            rest = (self.eps[norm], stats[0, -1:], pre_mask, self.group, coef)
            self.kernels.synchronize_gradient(dweight, dbias, weight, *self.statistics(stats, norm), *rest)

    def gates(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of one layer's pooled [N, k], hidden [N, r] and gate [N, k]."""
        sizes = (self.growth, self.hidden, self.growth)
        parts = row.split([self.samples * size for size in sizes])
        pooled, hidden, gate = (part.view(self.samples, size) for part, size in zip(parts, sizes, strict=True))
        return pooled, hidden, gate


def run_layers(stage: Stage, inputs: list[Tensor], features: Tensor, frozen_stats, dropout_scale: float, keep: bool):
    s, kernels = stage, stage.kernels
    moments = s.empty(2, s.samples, s.channels)
    mean, m2 = moments
    offset = 0
    for x in inputs:
        kernels.append(x, features, offset, mean, m2)
        offset += x.size(1)
    stats = s.empty(4, s.ends[-1] + (s.group >= 0)).zero_()
    given = iter(frozen_stats)
    for norm, is_frozen in enumerate(s.frozen):
        if is_frozen:
            for row in s.statistics(stats, norm):
                row.copy_(next(given))
    gates = s.empty(s.count, s.samples * (2 * s.growth + s.hidden)) if s.hidden else s.empty(0)
    kept = [s.bottleneck() for _ in range(s.count)] if keep else []
    workspace = None if keep else s.bottleneck()
    for i, (weight1, bias1, conv1, weight2, bias2, conv2, *excite) in enumerate(s.layers):
        masks = s.masks[i]
        offset = s.in_channels + i * s.growth
        scale, shift = s.fold(
            2 * i, weight1, bias1, stats, moments, s.pixels, masks.get(MASK_PRE_NORM), masks.get(MASK_PRE_CONV1)
        )
        b = kept[i] if keep else workspace
        inner = s.empty(2, 1, s.width)
        kernels.bottleneck_forward(features, scale, shift, conv1, b, *inner)
        scale, shift = s.fold(
            2 * i + 1, weight2, bias2, stats, inner, s.samples * s.pixels, None, masks.get(MASK_PRE_CONV2)
        )
        kernels.conv3x3_forward(
            b, scale, shift, conv2, masks.get(MASK_DROPOUT), dropout_scale, features, offset, mean, m2
        )
        if excite:
            kernels.squeeze_excite_forward(features, offset, mean, m2, *excite, *s.gates(gates[i]))
    bottlenecks = torch.stack(kept) if keep else s.empty(0, dtype=s.x.dtype)
    return moments, stats, gates, bottlenecks


def run_layers_backward(stage: Stage, features, source, grad, coef, stats, gates, bottlenecks, dropout_scale, dparams):
    """All layers from last to first. `source` holds the gradient of the last layer's output, `grad` accumulates."""
    s, kernels = stage, stage.kernels
    each = len(s.layers[0])
    workspace = None if bottlenecks.dim() == 3 else s.bottleneck()
    dv = s.empty(s.samples * s.pixels, padded_width(s.width), dtype=gradient_dtype(features))
    table = s.empty(3, s.width)
    for i in reversed(range(s.count)):
        weight1, bias1, conv1, weight2, bias2, conv2, *excite = s.layers[i]
        dweight1, dbias1, dconv1, dweight2, dbias2, dconv2, *dexcite = dparams[i * each : (i + 1) * each]
        masks = s.masks[i]
        q, r1, r2 = (masks.get(bit) for bit in (MASK_PRE_NORM, MASK_PRE_CONV1, MASK_PRE_CONV2))
        offset = s.in_channels + i * s.growth
        scale1, shift1 = s.fold(2 * i, weight1, bias1, stats, None, 0, q, r1)
        scale2, shift2 = s.fold(2 * i + 1, weight2, bias2, stats, None, 0, None, r2)
        b = bottlenecks[i] if workspace is None else workspace
        if workspace is not None:
            kernels.bottleneck_forward(features, scale1, shift1, conv1, b, None, None)
        if excite:
            fc1, _, fc2, _ = excite
            kernels.squeeze_excite_backward(features, source, offset, fc1, fc2, *s.gates(gates[i]), coef, *dexcite)
        kernels.conv3x3_backward(
            *(b, scale2, shift2, r2, conv2, masks.get(MASK_DROPOUT), dropout_scale, features, source, coef, offset),
            *(weight2, *s.statistics(stats, 2 * i + 1), s.eps[2 * i + 1], s.local(2 * i + 1)),
            *(dv, dconv2, dweight2, dbias2, table),
        )
        s.finish_norm_backward(2 * i + 1, dweight2, dbias2, weight2, stats, None, table[:, None])
        kernels.bottleneck_backward(
            *(features, scale1, shift1, q, r1, conv1, dv, b, table),
            *(weight1, *s.statistics(stats, 2 * i), s.eps[2 * i], s.local(2 * i)),
            *(source, grad, coef, dconv1, dweight1, dbias1, None, None, None),
        )
        s.finish_norm_backward(2 * i, dweight1, dbias1, weight1, stats, q, coef)
        source = grad
