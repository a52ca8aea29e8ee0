"""The layers of a stage, forward and backward, composed of kernel ops, for `dense_stage.py` and `dense_layer.py`."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from .._layout import arithmetic_dtype, gradient_dtype, padded_width
from .._ops import sync_batch_norm
from .._protocol import LayerParams, MaskKind, Options, StageSizes
from . import backward, forward

TWINS = SimpleNamespace(**{**vars(forward), **vars(backward), **vars(sync_batch_norm)})


class Stage(StageSizes):
    """The flat arguments of an op by name: parameters, masks and norms of each layer, and the sizes.

    x: maps with the stage's samples, size, dtype and device; kernels: the kernel ops to compose, by default the twins.
    """

    def __init__(
        self,
        x: Tensor,
        in_channels: int,
        params: Sequence[Tensor],
        masks: Sequence[Tensor],
        eps: Sequence[float],
        frozen: Sequence[int],
        dropout_scale: float,
        options: Sequence[int],
        kernels=None,
    ):
        super().__init__(params, Options(*options), in_channels)
        self.kernels = kernels or TWINS
        self.x, self.samples, self.pixels = x, x.size(0), x.shape[2:].numel()
        self.dtype = arithmetic_dtype(x.dtype)
        kinds = [kind for kind in MaskKind.ALL if self.options.mask_kind & kind]
        self.masks = [dict(zip(kinds, masks[i * len(kinds) :], strict=False)) for i in range(len(self.layers))]
        self.eps, self.frozen, self.dropout_scale = eps, frozen, dropout_scale

    @property
    def rows(self) -> int:
        return self.samples * self.pixels

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.x.new_empty(shape, dtype=dtype or self.dtype)

    def keeps(self, layer: int) -> bool:
        """True if forward keeps the bottleneck of this layer for backward."""
        return layer >= len(self.layers) - self.options.kept_bottlenecks

    def new_bottleneck(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.empty(self.rows, padded_width(self.width), dtype=dtype or self.x.dtype)

    def columns(self, stats: Tensor, norm: int) -> Tensor:
        """View of the mean, the variance, the scale and the shift of a batch normalization."""
        start = sum(self.norm_widths[:norm])
        return stats[:, start : start + self.norm_widths[norm]]

    def statistics(self, stats: Tensor, norm: int) -> Tensor:
        """View of the mean and the variance of a batch normalization."""
        return self.columns(stats, norm)[:2]

    def fold(self, norm, weight, bias, stats, moments=None, pixels=0, pre_mask=None, post_mask=None):
        """Scale and shift of a batch normalization. If moments are passed, its statistics are computed first."""
        mean, var = self.statistics(stats, norm)
        has_statistics = moments is None or bool(self.frozen[norm])
        scale, shift = self.columns(stats, norm)[2:, None]  # kept for backward unless masks are folded in
        if not (pre_mask is None and post_mask is None):
            scale, shift = self.empty(2, self.samples, self.norm_widths[norm])
        elif moments is None:
            return scale, shift
        source = (mean[None], var[None]) if moments is None else moments
        rest = (weight, bias, self.eps[norm])
        self.kernels.fold_norm(*source, pixels, pre_mask, post_mask, *rest, has_statistics, mean, var, scale, shift)
        if self.options.group >= 0 and not has_statistics:
            self.kernels.synchronize_statistics(mean, var, self.rows, self.options.group, stats[0, -1:])
            self.kernels.fold_norm(*source, pixels, pre_mask, post_mask, *rest, True, mean, var, scale, shift)
        return scale, shift

    def is_local(self, norm: int) -> bool:
        """True if the statistics of a norm come from this process's batch alone."""
        return not self.frozen[norm] and self.options.group < 0

    def finish_norm_backward(self, norm, dweight, dbias, weight, stats, pre_mask, coef) -> None:
        """Add to coef the part of the norm's gradient that flows through statistics which processes share."""
        if self.options.group >= 0 and not self.frozen[norm]:
            rest = (self.eps[norm], stats[0, -1:], pre_mask, self.options.group, coef)
            self.kernels.synchronize_gradient(dweight, dbias, weight, *self.statistics(stats, norm), *rest)

    def gates(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of one layer's pooled [N, k], hidden [N, r] and gate [N, k]."""
        sizes = (self.growth, self.hidden, self.growth)
        parts = row.split([self.samples * size for size in sizes])
        pooled, hidden, gate = (part.view(self.samples, size) for part, size in zip(parts, sizes, strict=True))
        return pooled, hidden, gate

    def gradients_of_layers(self, dparams: Sequence[Tensor]) -> Iterator[LayerParams]:
        """The gradients of the layers' parameters by name."""
        return iter(StageSizes(dparams, self.options, self.in_channels).layers)


def run_layers(stage: Stage, inputs: list[Tensor], features: Tensor, frozen_stats: list[Tensor]):
    """Forward of all layers: (moments of the buffer, stats, gates, bottlenecks)."""
    s, kernels = stage, stage.kernels
    moments = s.empty(2, s.samples, s.channels)
    mean, m2 = moments
    offset = 0
    for x in inputs:
        kernels.append(x, features, offset, mean, m2)
        offset += x.size(1)
    stats = s.empty(*s.stats_shape()).zero_()
    statistics = iter(frozen_stats)
    for norm, is_frozen in enumerate(s.frozen):
        if is_frozen:
            for row in s.statistics(stats, norm):
                row.copy_(next(statistics))
    gates = s.empty(*s.gates_shape(s.samples))
    shared, kept = s.new_bottleneck(), s.options.kept_bottlenecks
    bottlenecks = [s.new_bottleneck() if s.keeps(i) else shared for i in range(len(s.layers))]
    for i, (layer, b) in enumerate(zip(s.layers, bottlenecks, strict=True)):
        masks, offset = s.masks[i], s.layer_channels(i)
        norm1 = (2 * i, layer.norm1_weight, layer.norm1_bias, stats)
        scale, shift = s.fold(*norm1, moments, s.pixels, masks.get(MaskKind.PRE_NORM), masks.get(MaskKind.PRE_CONV1))
        inner = s.empty(2, 1, s.width)
        kernels.bottleneck_forward(features, scale, shift, layer.conv1_weight, b, *inner)
        norm2 = (2 * i + 1, layer.norm2_weight, layer.norm2_bias, stats)
        scale, shift = s.fold(*norm2, inner, s.rows, None, masks.get(MaskKind.PRE_CONV2))
        dropout = (masks.get(MaskKind.DROPOUT), s.dropout_scale)
        kernels.conv3x3_forward(b, scale, shift, layer.conv2_weight, *dropout, features, offset, mean, m2)
        if (mask := masks.get(MaskKind.POST_CONV2)) is not None:
            own = slice(offset, offset + s.growth)
            features[:, own] *= mask.view(*mask.shape, *[1] * (features.dim() - 2))
            mean[:, own] *= mask
            m2[:, own] *= mask.square()
        if s.hidden:
            kernels.squeeze_excite_forward(features, offset, mean, m2, *layer.squeeze_excite, *s.gates(gates[i]))
    return moments, stats, gates, torch.stack(bottlenecks[-kept:]) if kept else s.empty(0, dtype=s.x.dtype)


def run_layers_backward(stage: Stage, features, source, grad, coef, stats, gates, bottlenecks, dparams):
    """Backward of all layers, last to first. `source` has the last layer's output gradient, `grad` accumulates."""
    s, kernels = stage, stage.kernels
    workspace = s.new_bottleneck()
    dv = s.new_bottleneck(gradient_dtype(features))
    db_affine = s.empty(3, s.width)
    gradients = [*s.gradients_of_layers(dparams)]
    for i in reversed(range(len(s.layers))):
        layer, d, masks, offset = s.layers[i], gradients[i], s.masks[i], s.layer_channels(i)
        q, r1, r2 = (masks.get(kind) for kind in (MaskKind.PRE_NORM, MaskKind.PRE_CONV1, MaskKind.PRE_CONV2))
        scale1, shift1 = s.fold(2 * i, layer.norm1_weight, layer.norm1_bias, stats, None, 0, q, r1)
        scale2, shift2 = s.fold(2 * i + 1, layer.norm2_weight, layer.norm2_bias, stats, None, 0, None, r2)
        b = bottlenecks[i - len(s.layers)] if s.keeps(i) else workspace
        if not s.keeps(i):
            kernels.bottleneck_forward(features, scale1, shift1, layer.conv1_weight, b, None, None)
        if s.hidden:
            excite = (layer.fc1_weight, layer.fc2_weight, *s.gates(gates[i]), coef)
            kernels.squeeze_excite_backward(features, source, offset, *excite, *d.squeeze_excite)
        if (mask := masks.get(MaskKind.POST_CONV2)) is not None:
            coef[:, :, offset : offset + s.growth] *= mask
        kernels.conv3x3_backward(
            *(b, scale2, shift2, r2, layer.conv2_weight, masks.get(MaskKind.DROPOUT), s.dropout_scale),
            *(features, source, coef, offset),
            *(layer.norm2_weight, *s.statistics(stats, 2 * i + 1), s.eps[2 * i + 1], s.is_local(2 * i + 1)),
            *(dv, d.conv2_weight, d.norm2_weight, d.norm2_bias, db_affine),
        )
        norm2 = (2 * i + 1, d.norm2_weight, d.norm2_bias, layer.norm2_weight)
        s.finish_norm_backward(*norm2, stats, None, db_affine[:, None])
        kernels.bottleneck_backward(
            *(features, scale1, shift1, q, r1, layer.conv1_weight, dv, b, db_affine),
            *(layer.norm1_weight, *s.statistics(stats, 2 * i), s.eps[2 * i], s.is_local(2 * i)),
            *(source, grad, coef, d.conv1_weight, d.norm1_weight, d.norm1_bias, None, None, None),
        )
        norm1 = (2 * i, d.norm1_weight, d.norm1_bias, layer.norm1_weight)
        s.finish_norm_backward(*norm1, stats, q, coef)
        source = grad
