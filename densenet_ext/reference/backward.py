"""Backward kernel ops. The shapes' notation and the deferred gradient of batch normalization are in `__init__.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from .forward import bottleneck_forward
from .views import planes, read, spread, write, write_rows


def _true_gradient(features: Tensor, grad: Tensor, coef: Tensor, columns: slice) -> Tensor:
    factor, constant, slope = coef[:, :, columns, None, None]
    return factor * grad[:, columns] + constant + slope * read(features, columns)


def finish_gradient(features: Tensor, grad: Tensor, coef: Tensor, offset: int, out: Tensor) -> None:
    """out = coef[0] * grad + coef[1] + coef[2] * x for the channels from offset on.

    features [N, C, H, W] S; grad [N, C, H, W] A; coef [3, N, C] A; out [N, c, H, W] S, written.
    """
    out.copy_(_true_gradient(features, grad, coef, slice(offset, offset + out.size(1))))


def squeeze_excite_backward(
    features: Tensor,
    grad: Tensor,
    offset: int,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    gate: Tensor,
    coef: Tensor,
    dfc1_weight: Tensor,
    dfc1_bias: Tensor,
    dfc2_weight: Tensor,
    dfc2_bias: Tensor,
) -> None:
    """Gradients of squeeze-and-excitation; coef becomes that of the gradient before the gate.

    With g the gradient after the gate and x the gated output, (1 - gate) sum_p g x is the gradient before the sigmoid:
    nothing is divided by the gate. The gradient before the gate is gate * g + dpooled / P.
    features [N, C, H, W] S; grad [N, C, H, W] A; coef [3, N, C] A, changed at the k channels from offset on;
    the others as in squeeze_excite_forward.
    """
    columns = slice(offset, offset + fc2_weight.size(0))
    g = _true_gradient(features, grad, coef, columns)
    dlogit = (g * read(features, columns)).sum((2, 3)) * (1 - gate)
    dhidden = (dlogit @ fc2_weight.flatten(1)) * (hidden > 0)
    dpooled = dhidden @ fc1_weight.flatten(1)
    write(dfc2_weight, dlogit.t() @ hidden)
    write(dfc2_bias, dlogit.sum(0))
    write(dfc1_weight, dhidden.t() @ pooled)
    write(dfc1_bias, dhidden.sum(0))
    coef[:, :, columns] *= gate
    coef[1, :, columns] += dpooled / (features.size(2) * features.size(3))


def _norm_sums(x: Tensor, dv: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """S1 = sum dv and S2 = sum dv (x - mean) rstd over samples and pixels: the gradients of bias and weight, [c]."""
    xhat = (x - mean[:, None, None]) * rstd[:, None, None]
    return dv.sum((0, 2, 3)), (dv * xhat).sum((0, 2, 3))


def _statistics_terms(
    slope: Tensor, mean: Tensor, rstd: Tensor, sum1: Tensor, sum2: Tensor, values: int, training: bool
) -> tuple[Tensor, Tensor]:
    """Batch statistics' part -slope (S1 + xhat S2)/M of the gradient of x, as (constant, factor of x), [c] each."""
    values = max(values, 1)
    constant = -slope * (sum1 - mean * rstd * sum2) / values
    factor = -slope * rstd * sum2 / values
    return (constant, factor) if training else (torch.zeros_like(slope), torch.zeros_like(slope))


def conv3x3_backward(
    bottleneck: Tensor,
    scale: Tensor,
    shift: Tensor,
    post_mask: Tensor | None,
    weight: Tensor,
    dropout_mask: Tensor | None,
    dropout_scale: float,
    features: Tensor,
    grad: Tensor,
    coef: Tensor,
    offset: int,
    norm_weight: Tensor,
    batch_mean: Tensor,
    batch_var: Tensor,
    eps: float,
    training: bool,
    dv: Tensor,
    dweight: Tensor,
    dnorm_weight: Tensor,
    dnorm_bias: Tensor,
    db_affine: Tensor,
    allow_tf32: bool = False,
) -> None:
    """Backward of ReLU and the 3x3 convolution, and the affine map that takes the gradient through norm2.

    dy = dropout(coef[0] grad + coef[1] + coef[2] x), dv = conv3x3^T(dy) * r * [scale * b + shift > 0], r = post_mask;
    the gradient of b is t[0] dv + t[1] + t[2] b with t = db_affine; t[1] and t[2] are 0 unless training.
    bottleneck b [M, K2p] S; scale, shift [1 or N, K2], post_mask [N, K2], weight [k, K2, 3, 3] A; dropout_mask bool
    [N, k, H, W]; features [N, C, H, W] S; grad [N, C, H, W], coef [3, N, C], norm_weight, batch_mean,
    batch_var [K2] A. Written, all A: dv [M, K2p], zero from column K2 on; dweight like weight; dnorm_weight, dnorm_bias [K2];
    db_affine [3, K2].
    """
    out_channels, width = weight.shape[:2]
    b = planes(bottleneck, features, width)
    v = spread(scale) * b + spread(shift)
    dy = _true_gradient(features, grad, coef, slice(offset, offset + out_channels))
    if dropout_mask is not None:
        dy = torch.where(dropout_mask, dy * dropout_scale, 0.0)
    dweight.copy_(conv2d_weight(F.relu(v), weight.shape, dy, padding=1))
    dvalue = conv2d_input(b.shape, weight, dy, padding=1) * (v > 0)
    if post_mask is not None:
        dvalue = dvalue * spread(post_mask)
    write_rows(dv, dvalue)
    dvalue = planes(dv, features, width)  # rounded as in dv: the sums have to cancel these values in norm2's gradient
    rstd = (batch_var + eps).rsqrt()
    slope = norm_weight * rstd
    sum1, sum2 = _norm_sums(b, dvalue, batch_mean, rstd)
    dnorm_bias.copy_(sum1)
    dnorm_weight.copy_(sum2)
    db_affine[0] = slope
    db_affine[1], db_affine[2] = _statistics_terms(slope, batch_mean, rstd, sum1, sum2, b.numel() // width, training)


def bottleneck_backward(
    features: Tensor,
    scale: Tensor,
    shift: Tensor,
    pre_mask: Tensor | None,
    post_mask: Tensor | None,
    weight: Tensor,
    dv: Tensor,
    bottleneck: Tensor,
    db_affine: Tensor,
    norm_weight: Tensor,
    batch_mean: Tensor,
    batch_var: Tensor,
    eps: float,
    training: bool,
    grad_in: Tensor | None,
    grad: Tensor,
    coef: Tensor,
    dweight: Tensor,
    dnorm_weight: Tensor,
    dnorm_bias: Tensor,
    previous_scale: Tensor | None,
    previous_shift: Tensor | None,
    previous_weight: Tensor | None,
    allow_tf32: bool = False,
) -> None:
    """Joint backward of norm1, ReLU and the 1x1 convolution, accumulating into the first c channels of grad and coef.

    db = t[0] dv + t[1] + t[2] b with t = db_affine, dweight = db^T z, dz = db weight; with masks q = pre_mask,
    r = post_mask and xhat = (q x - mean) rstd: dv1 = dz r [z > 0], S1 = sum dv1, S2 = sum dv1 xhat,
        grad    = grad_in (0 where None) + q norm_weight rstd dv1
        coef[1] -= q norm_weight rstd (S1 - mean rstd S2) / M          (where training)
        coef[2] -= q^2 norm_weight rstd^2 S2 / M                       (where training)
    features [N, C, H, W] S; scale, shift [1 or N, c], masks [N, c], weight [K2, c] or [K2, c, 1, 1], dv [M, K2p] A;
    bottleneck b [M, K2p] S; db_affine [3, K2], norm_weight, batch_mean, batch_var [c] A; grad_in [N, C, H, W] A, which
    may be grad itself. Written, all A: grad [N, C, H, W] and coef [3, N, C] at the first c channels, dweight like
    weight, dnorm_weight, dnorm_bias [c].
    previous_scale, previous_shift, previous_weight [K2, c']: the layer that backward reaches next, or None. Its b
    is computed again and overwrites this layer's in `bottleneck`.
    """
    width, channels = weight.shape[:2]
    columns = slice(channels)
    factor, constant, slope = db_affine[:, :, None, None]
    db = factor * planes(dv, features, width) + constant + slope * planes(bottleneck, features, width)
    x = read(features, columns)
    z = F.relu(spread(scale) * x + spread(shift))
    dz = F.conv2d(db, weight.reshape(width, channels).t()[:, :, None, None])
    write(dweight, torch.einsum("nohw,nchw->oc", db, z))
    dvalue = dz * (z > 0)
    if post_mask is not None:
        dvalue = dvalue * spread(post_mask)
    q = torch.ones_like(x[:, :, 0, 0]) if pre_mask is None else pre_mask
    rstd = (batch_var + eps).rsqrt()
    slope = norm_weight * rstd
    sum1, sum2 = _norm_sums(spread(q) * x, dvalue, batch_mean, rstd)
    dnorm_bias.copy_(sum1)
    dnorm_weight.copy_(sum2)
    start = 0 if grad_in is None else grad_in[:, columns]
    grad[:, columns] = start + spread(q * slope) * dvalue
    values = x.numel() // channels
    constant, factor = _statistics_terms(slope, batch_mean, rstd, sum1, sum2, values, training)
    coef[1, :, columns] += q * constant
    coef[2, :, columns] += q.square() * factor
    if previous_weight is not None:
        bottleneck_forward(features, previous_scale, previous_shift, previous_weight, bottleneck, None, None)


def _consumer_backward(
    x: Tensor,
    dvalue: Tensor,
    norm_weight: Tensor,
    batch_mean: Tensor,
    batch_var: Tensor,
    eps: float,
    training: bool,
    grad: Tensor,
    coef: Tensor,
    dnorm_weight: Tensor,
    dnorm_bias: Tensor,
) -> None:
    """Backward of a tail's batch normalization. It overwrites grad and coef instead of adding to them."""
    rstd = (batch_var + eps).rsqrt()
    slope = norm_weight * rstd
    sum1, sum2 = _norm_sums(x, dvalue, batch_mean, rstd)
    dnorm_bias.copy_(sum1)
    dnorm_weight.copy_(sum2)
    grad.copy_(slope[:, None, None] * dvalue)
    coef[0] = 1
    coef[1], coef[2] = _statistics_terms(slope, batch_mean, rstd, sum1, sum2, x.numel() // x.size(1), training)


def transition_backward(
    features: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    batch_mean: Tensor,
    batch_var: Tensor,
    eps: float,
    training: bool,
    grad_out: Tensor,
    grad: Tensor,
    coef: Tensor,
    dweight: Tensor,
    dnorm_weight: Tensor,
    dnorm_bias: Tensor,
    allow_tf32: bool = False,
) -> None:
    """Backward of the transition; initializes grad and coef, so that neither needs a fill with zeros.

    grad is norm_weight rstd dv, with dv = [z > 0] (grad_out weight) / 4 in each 2x2 window and 0 on a last odd row or
    column; coef is (1, statistics terms).
    features [N, C, H, W] S; scale, shift [1, C], weight [O, C] or [O, C, 1, 1], norm_weight, batch_mean, batch_var [C]
    A; grad_out [N, O, H//2, W//2] S. Written, all A: grad [N, C, H, W], coef [3, N, C], dweight like weight,
    dnorm_weight, dnorm_bias [C].
    """
    out_channels, channels = weight.shape[:2]
    x = read(features, slice(None))
    z = F.relu(spread(scale) * x + spread(shift))
    g = grad_out.to(z.dtype)
    write(dweight, torch.einsum("nohw,nchw->oc", g, F.avg_pool2d(z, 2)))
    dpooled = F.conv2d(g, weight.reshape(out_channels, channels).t()[:, :, None, None]) / 4
    dvalue = torch.zeros_like(z)
    height, width = 2 * g.size(2), 2 * g.size(3)
    dvalue[:, :, :height, :width] = dpooled.repeat_interleave(2, 2).repeat_interleave(2, 3)
    dvalue = dvalue * (z > 0)
    _consumer_backward(
        x, dvalue, norm_weight, batch_mean, batch_var, eps, training, grad, coef, dnorm_weight, dnorm_bias
    )


def head_backward(
    features: Tensor,
    scale: Tensor,
    shift: Tensor,
    norm_weight: Tensor,
    batch_mean: Tensor,
    batch_var: Tensor,
    eps: float,
    training: bool,
    grad_out: Tensor,
    grad: Tensor,
    coef: Tensor,
    dnorm_weight: Tensor,
    dnorm_bias: Tensor,
) -> None:
    """Backward of the head; initializes grad and coef. dv = [z > 0] grad_out / P.

    features [N, C, H, W] S; scale, shift [1, C], norm_weight, batch_mean, batch_var [C] A; grad_out [N, C] S.
    Written, all A: grad [N, C, H, W], coef [3, N, C], dnorm_weight, dnorm_bias [C].
    """
    x = read(features, slice(None))
    z = F.relu(spread(scale) * x + spread(shift))
    dvalue = spread(grad_out.to(z.dtype) / (z.size(2) * z.size(3))) * (z > 0)
    _consumer_backward(
        x, dvalue, norm_weight, batch_mean, batch_var, eps, training, grad, coef, dnorm_weight, dnorm_bias
    )


def stem_backward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    batch_mean: Tensor,
    batch_var: Tensor,
    eps: float,
    training: bool,
    grad_out: Tensor,
    dx: Tensor | None,
    dnorm_weight: Tensor,
    dnorm_bias: Tensor,
) -> None:
    """Backward of the stem, which computes z = relu(norm(x)) again.

    dv = [z > 0] times the sum of grad_out over the windows whose first maximum is this pixel (NaN counts as maximum);
    dx = norm_weight rstd (dv - S1 / M - xhat S2 / M), or norm_weight rstd dv unless training.
    x [N, C, H, W] S; norm_weight, norm_bias, batch_mean, batch_var [C] A; grad_out [N, C, (H+1)//2, (W+1)//2] S. Written:
    dx like x, unless None; dnorm_weight, dnorm_bias [C] A.
    """
    values = read(x, slice(None))
    rstd = (batch_var + eps).rsqrt()
    slope = norm_weight * rstd
    z = F.relu(slope[:, None, None] * values + (norm_bias - slope * batch_mean)[:, None, None])
    _, places = F.max_pool2d(z, 3, stride=2, padding=1, return_indices=True)
    dvalue = torch.zeros_like(z).flatten(2).scatter_add_(2, places.flatten(2), grad_out.to(z.dtype).flatten(2))
    dvalue = torch.where(z <= 0, 0.0, dvalue.view_as(z))
    sum1, sum2 = _norm_sums(values, dvalue, batch_mean, rstd)
    dnorm_bias.copy_(sum1)
    dnorm_weight.copy_(sum2)
    if dx is not None:
        count = values.numel() // values.size(1)
        gradient = slope[:, None, None] * dvalue
        if training:  # otherwise a NaN of x may only reach its neighbors
            constant, factor = _statistics_terms(slope, batch_mean, rstd, sum1, sum2, count, training)
            gradient = gradient + constant[:, None, None] + factor[:, None, None] * values
        dx.copy_(gradient)
