"""Forward kernel ops. The shapes' notation is in `__init__.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .views import planes, read, spread, write, write_moments, write_rows


def append(x: Tensor, features: Tensor, offset: int, mean: Tensor | None, m2: Tensor | None) -> None:
    """features[:, offset : offset + c] = x, and the moments of those channels.

    x [N, c, H, W] S or any other floating dtype; features [N, C, H, W] S, written; mean, m2 [N, C] A, written.
    """
    columns = slice(offset, offset + x.size(1))
    features[:, columns] = x
    write_moments(features[:, columns], mean, m2, columns)


def fold_norm(
    mean: Tensor,
    m2: Tensor,
    pixels: int,
    pre_mask: Tensor | None,
    post_mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    has_statistics: bool,
    batch_mean: Tensor,
    batch_var: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> None:
    """Batch statistics from moments, and batch normalization folded into scale and shift.

    With masks q = pre_mask before the normalization and r = post_mask after the rectifier, R rows of `pixels` values:
        batch_mean = sum_n q mean / R      batch_var = sum_n (q^2 m2 + pixels (q mean - batch_mean)^2) / (R pixels)
        scale = r q weight rstd            shift = r (bias - weight rstd batch_mean)       rstd = 1/sqrt(batch_var + eps)
    mean, m2 [R, >= c] A; pre_mask, post_mask [N, c] A; weight, bias [c] A; batch_mean, batch_var [c] A, written unless
    has_statistics; scale, shift [1 or N, c] A, written. Without any values the statistics are 0.
    """
    channels = weight.numel()
    if not has_statistics:
        mean, m2 = mean[:, :channels], m2[:, :channels]
        values = max(mean.size(0) * pixels, 1)
        masked = mean if pre_mask is None else pre_mask * mean
        spread = m2 if pre_mask is None else pre_mask.square() * m2
        batch_mean.copy_(masked.sum(0) / max(mean.size(0), 1))
        batch_var.copy_((spread + pixels * (masked - batch_mean).square()).sum(0) / values)
    slope = weight * (batch_var + eps).rsqrt()
    folded, rest = slope[None], (bias - slope * batch_mean)[None]
    if pre_mask is not None:
        folded = folded * pre_mask
    if post_mask is not None:
        folded, rest = folded * post_mask, rest * post_mask
    scale.copy_(folded.expand_as(scale))
    shift.copy_(rest.expand_as(shift))


def bottleneck_forward(
    features: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bottleneck: Tensor,
    mean: Tensor | None,
    m2: Tensor | None,
    allow_tf32: bool = False,
) -> None:
    """bottleneck = relu(scale * x + shift) @ weight^T for the first c channels of features.

    features [N, C, H, W] S; scale, shift [1 or N, c] A; weight [K2, c] or [K2, c, 1, 1] A; bottleneck [M, K2p] S,
    written, row n*P + p, zero from column K2 on; mean, m2 [1, K2] A, written: moments over all M rows.
    """
    width, channels = weight.shape[:2]
    z = F.relu(spread(scale) * read(features, slice(channels)) + spread(shift))
    write_rows(bottleneck, F.conv2d(z, weight.view(width, channels, 1, 1)))
    if mean is not None:
        rows = bottleneck[:, :width].to(mean.dtype)
        write(mean, rows.sum(0) / max(rows.size(0), 1))
        write(m2, (rows - mean).square().sum(0))


def conv3x3_forward(
    bottleneck: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    dropout_mask: Tensor | None,
    dropout_scale: float,
    features: Tensor,
    offset: int,
    mean: Tensor | None,
    m2: Tensor | None,
    allow_tf32: bool = False,
) -> None:
    """features[:, offset : offset + k] = dropout(conv3x3(relu(scale * b + shift), padding=1)), and their moments.

    bottleneck b [M, K2p] S; scale, shift [1 or N, K2] A; weight [k, K2, 3, 3] A; dropout_mask bool [N, k, H, W], true
    where a value is kept and multiplied by dropout_scale; features [N, C, H, W] S, written; mean, m2 [N, C] A, written.
    """
    columns = slice(offset, offset + weight.size(0))
    h = F.relu(spread(scale) * planes(bottleneck, features, weight.size(1)) + spread(shift))
    y = F.conv2d(h, weight, padding=1)
    if dropout_mask is not None:
        y = torch.where(dropout_mask, y * dropout_scale, 0.0)
    features[:, columns] = y
    write_moments(features[:, columns], mean, m2, columns)


def squeeze_excite_forward(
    features: Tensor,
    offset: int,
    mean: Tensor,
    m2: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    gate: Tensor,
) -> None:
    """Squeeze-and-excitation in place on the k channels of features from offset on, and on their moments.

    pooled = mean, hidden = relu(pooled fc1^T + b1), gate = sigmoid(hidden fc2^T + b2), x *= gate.
    features [N, C, H, W] S, mean, m2 [N, C] A: changed; fc1_weight [r, k, ...], fc1_bias [r], fc2_weight [k, r, ...],
    fc2_bias [k] A; pooled [N, k], hidden [N, r], gate [N, k] A, written.
    """
    columns = slice(offset, offset + fc2_weight.size(0))
    pooled.copy_(mean[:, columns])
    hidden.copy_(F.relu(F.linear(pooled, fc1_weight.flatten(1), fc1_bias)))
    gate.copy_(F.linear(hidden, fc2_weight.flatten(1), fc2_bias).sigmoid())
    features[:, columns] = features[:, columns].to(gate.dtype) * spread(gate)
    mean[:, columns] *= gate
    m2[:, columns] *= gate.square()


def transition_forward(
    features: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, out: Tensor, allow_tf32: bool = False
) -> None:
    """out = avg_pool2d(relu(scale * x + shift), 2) @ weight^T over all C channels: pooling commutes with a 1x1 convolution.

    features [N, C, H, W] S; scale, shift [1, C] A; weight [O, C] or [O, C, 1, 1] A; out [N, O, H//2, W//2] S, written.
    """
    z = F.relu(spread(scale) * read(features, slice(None)) + spread(shift))
    out.copy_(F.conv2d(F.avg_pool2d(z, 2), weight.view(*weight.shape[:2], 1, 1)))


def head_forward(features: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """out = mean over the pixels of relu(scale * x + shift).

    features [N, C, H, W] S; scale, shift [1, C] A; out [N, C] S, written.
    """
    z = F.relu(spread(scale) * read(features, slice(None)) + spread(shift))
    out.copy_(z.mean((2, 3)))


def stem_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    has_statistics: bool,
    batch_mean: Tensor,
    batch_var: Tensor,
    out: Tensor,
) -> None:
    """out = max_pool2d(relu(norm(x)), 3, stride 2, padding 1), with the passed statistics if has_statistics.

    x [N, C, H, W] S; norm_weight, norm_bias [C] A; batch_mean, batch_var (biased) [C] A, written unless has_statistics;
    out [N, C, (H+1)//2, (W+1)//2] S, written. Without any values the statistics are 0.
    """
    values = read(x, slice(None))
    if not has_statistics:
        count = max(values.numel() // values.size(1), 1)
        batch_mean.copy_(values.sum((0, 2, 3)) / count)
        batch_var.copy_((values - batch_mean[:, None, None]).square().sum((0, 2, 3)) / count)
    scale = norm_weight * (batch_var + eps).rsqrt()
    shift = norm_bias - scale * batch_mean
    z = F.relu(scale[:, None, None] * values + shift[:, None, None])
    out.copy_(F.max_pool2d(z, 3, stride=2, padding=1))
