"""Autograd of the stage ops."""

from collections.abc import Callable

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from .._layout import arithmetic_dtype, gradient_dtype, lies_channels_last
from .._protocol import GradientLayout, Options, Tail, tail_params
from .._transforms import is_plain
from .batched_gradients import no_second_derivative, one_by_one
from .handles import (
    dense_block_backward,
    dense_layer_backward,
    dense_stage,
    dense_stage_backward,
    dense_stem_backward,
    dense_tail_backward,
    memory_errors,
    new_gradients,
)


def _run_backward(run: Callable, *grads: Tensor) -> list[Tensor]:
    """Call run(*grads), which returns a tensor and a list of tensors, and return both as one list."""

    def flat(*grads):
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(g).tangent is not None for g in grads):
            no_second_derivative(None)
        with memory_errors():
            first, rest = run(*grads)
        return (first, *rest)

    return list(one_by_one(flat, *grads))


def _wanted(grads: list[Tensor], needed: list[bool]) -> list[Tensor | None]:
    return [grad if need else None for grad, need in zip(grads, needed, strict=True)]


def _saved_tensors(ctx) -> tuple[Tensor, ...]:
    """Return ctx.saved_tensors. If the output is among them and has been written to, the error says what to do."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{error} densenet_ext: backward of a fused dense block, and of a fused layer with squeeze-and-excitation, "
            "needs the output: clone it before writing to it, or set efficient='checkpoint'"
        ) from None


class _Refusal(torch.autograd.Function):
    """Identity on `grads` whose backward raises: the gradients may be used, but not differentiated again."""

    @staticmethod
    def forward(ctx, grads, *_):
        return grads

    @staticmethod
    def backward(ctx, *grads):
        no_second_derivative(ctx, *grads)


class _Place(torch.autograd.Function):
    """Two tensors without memory that stand for x in the graph: one gets x's gradient, one is for _Refusal to see x."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        return x.new_empty_strided(x.shape, (0,) * x.dim()), x.new_empty(0)

    @staticmethod
    def backward(ctx, dx, _):
        return dx


class DenseStage(torch.autograd.Function):
    """Autograd of dense_stage as one node: for a block without a tail, and for tracing, where a compiler plans memory.

    It is written by hand, because register_autograd takes milliseconds a step for lists of hundreds of tensors.
    """

    @staticmethod
    def forward(ctx, forward_op, inputs, *_):
        x, params, masks, _, *ctx.numbers = inputs
        output, features, *state = outputs = forward_op(*inputs)
        ctx.mark_non_differentiable(features, *state)
        ctx.set_materialize_grads(False)
        ctx.in_channels, ctx.params = x.shape[1], len(params)
        ctx.layout = _gradient_layout(x)
        has_tail = Options(*ctx.numbers[-1]).tail != Tail.NONE
        ctx.save_for_backward(features if has_tail else output, *state, *params, *masks)
        return outputs

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * (3 + ctx.params)
        features, stats, gates, bottlenecks, *rest = _saved_tensors(ctx)
        params, masks = rest[: ctx.params], rest[ctx.params :]
        need_x, *need_params = ctx.needs_input_grad[2:]
        layout = ctx.layout if need_x else GradientLayout.NONE
        rest = (features, params, masks, stats, gates, bottlenecks, *ctx.numbers, ctx.in_channels, layout)
        grads = _run_backward(lambda grad: dense_stage_backward(grad, *rest), grad)
        return None, None, *_wanted(grads, [need_x, *need_params])


class DenseBlock(torch.autograd.Function):
    """Autograd of the layers of a stage with a tail; DenseTail is that of the tail.

    There are two nodes because the engine holds the gradient that a node gets until that node is done: so the gradient
    of the stage's output is freed before the layers take their workspaces. In backward DenseTail hands the feature
    buffer, its gradient buffer and the coefficients to DenseBlock; in forward three tensors without memory stand for
    them. A fourth one connects x and the parameters to DenseTail, which refuses their second derivatives.
    """

    @staticmethod
    def forward(ctx, inputs, outputs, anchor, _, *params):
        x, _, masks, _, *ctx.numbers = inputs
        _, features, *state = outputs
        ctx.set_materialize_grads(False)
        ctx.in_channels, ctx.layout = x.shape[1], _gradient_layout(x)
        ctx.save_for_backward(*state, anchor, *params, *masks)
        coef = (3, *features.shape[:2])
        return (
            features.new_empty_strided(features.shape, (0,) * 4),
            features.new_empty_strided(features.shape, (0,) * 4, dtype=gradient_dtype(features)),
            features.new_empty_strided(coef, (0,) * 3, dtype=arithmetic_dtype(features.dtype)),
            features.new_empty(0),
        )

    @staticmethod
    def backward(ctx, features, buffer, coef, _):
        need_x, *need_params = ctx.needs_input_grad[3:]
        if buffer is None:
            return (None,) * (4 + len(need_params))
        stats, gates, bottlenecks, anchor, *rest = ctx.saved_tensors
        params, masks = rest[: len(need_params)], rest[len(need_params) :]
        layout = ctx.layout if need_x else GradientLayout.NONE
        rest = (features, params, masks, stats, gates, bottlenecks, *ctx.numbers, ctx.in_channels, layout)

        def run(buffer, coef):
            dparams = new_gradients(params)
            return dense_block_backward(buffer, coef, dparams, *rest), dparams

        with torch.no_grad():
            grads = _run_backward(run, buffer, coef)
        grads = _wanted(grads, [need_x, *need_params])
        if torch.is_grad_enabled():
            grads = _Refusal.apply(tuple(grads), buffer, coef, anchor, *params)
        return None, None, None, *grads


class DenseTail(torch.autograd.Function):
    """Autograd of the transition or the head of a stage. In forward it returns the stage's output."""

    @staticmethod
    def forward(ctx, inputs, outputs, anchor, *rest):
        *_, eps, frozen, _, options = inputs
        output, features, stats, *_ = outputs
        ctx.set_materialize_grads(False)
        ctx.numbers = (eps[-1], frozen[-1] != 0, options)
        ctx.save_for_backward(features, stats, anchor, *rest[3:])
        return output

    @staticmethod
    def backward(ctx, grad):
        needed = ctx.needs_input_grad[3:]
        if grad is None:
            return (None,) * (3 + len(needed))
        features, stats, anchor, *params = ctx.saved_tensors

        def run(grad):
            buffer, coef, dparams = dense_tail_backward(grad, features, params, stats, *ctx.numbers)
            return buffer, (coef, *dparams)

        grads = _run_backward(run, grad)
        if torch.is_grad_enabled():
            grads = _Refusal.apply(tuple(grads), grad, anchor, *params)
        return None, None, None, *_wanted([features, *grads], needed)


def _gradient_layout(x: Tensor) -> int:
    return GradientLayout.CHANNELS_LAST if lies_channels_last(x) else GradientLayout.DEVICE


def _stage_autograd(keyset, *inputs):
    def forward_op(*inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return dense_stage.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    x, params, *_, options = inputs
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *params))):
        return forward_op(*inputs)
    tail = tail_params(Options(*options).tail)
    if not tail or not is_plain(type(x)):
        return DenseStage.apply(forward_op, inputs, x, *params)
    outputs = forward_op(*inputs)
    place, anchor = _Place.apply(x) if x.requires_grad else (x, x.new_empty(0))
    *stand_ins, tail_anchor = DenseBlock.apply(inputs, outputs, anchor, place, *params[:-tail])
    return DenseTail.apply(inputs, outputs, tail_anchor, *stand_ins, *params[-tail:]), *outputs[1:]


def _layer_setup(ctx, inputs, output):
    xs, params, masks, frozen_stats, *ctx.numbers = inputs
    result, *state = output
    ctx.mark_non_differentiable(*state)
    ctx.set_materialize_grads(False)
    ctx.counts = (len(xs), len(params), len(masks), len(frozen_stats))
    # Only squeeze-and-excitation's gradient needs the output; without it the output may be written to.
    needs_output = Options(*ctx.numbers[-1]).squeeze_excite
    output = result if needs_output else result.new_zeros(()).expand(result.shape)
    ctx.save_for_backward(output, *state, *xs, *params, *masks)


def _layer_backward(ctx, grad, *_):
    xs, params, masks, frozen_stats = ctx.counts
    need_xs, need_params = ctx.needs_input_grad[:2]
    if grad is None:
        dxs, dparams = [None] * xs, [None] * params
    else:
        output, stats, gates, bottlenecks, *rest = _saved_tensors(ctx)
        inputs, rest = rest[:xs], rest[xs:]
        rest = (output, inputs, rest[:params], rest[params:], stats, gates, bottlenecks, *ctx.numbers)

        def run(grad):
            (dx, *dxs), dparams = dense_layer_backward(grad, *rest)
            return dx, (*dxs, *dparams)

        grads = _run_backward(run, grad)
        dxs, dparams = _wanted(grads[:xs], need_xs), _wanted(grads[xs:], need_params)
    return dxs, dparams, [None] * masks, [None] * frozen_stats, *[None] * len(ctx.numbers)


def _stem_setup(ctx, inputs, output):
    x, weight, bias, frozen_stats, ctx.eps = inputs
    _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.frozen = len(frozen_stats)
    ctx.save_for_backward(x, weight, bias, stats)


def _stem_backward(ctx, grad, *_):
    gradients = [None] * 3
    needed = ctx.needs_input_grad[:3]
    if grad is not None:
        rest = (*ctx.saved_tensors, ctx.eps, ctx.frozen > 0, needed[0])

        def run(grad):
            dx, dweight, dbias = dense_stem_backward(grad, *rest)
            return dx, (dweight, dbias)

        gradients = _wanted(_run_backward(run, grad), needed)
    return *gradients, [None] * ctx.frozen, None


_library = torch.library.Library("densenet_ext", "FRAGMENT")
_library.impl("dense_stage", _stage_autograd, "Autograd", with_keyset=True)
torch.library.register_autograd("densenet_ext::dense_layer", _layer_backward, setup_context=_layer_setup)
torch.library.register_autograd("densenet_ext::dense_stem", _stem_backward, setup_context=_stem_setup)
torch.library.register_autograd("densenet_ext::dense_stem_backward", no_second_derivative)
torch.library.register_autograd("densenet_ext::dense_stage_backward", no_second_derivative)
torch.library.register_autograd("densenet_ext::dense_tail_backward", no_second_derivative)
torch.library.register_autograd("densenet_ext::dense_layer_backward", no_second_derivative)
