"""Backward for a batch of gradients, as vectorized Jacobians ask for it: it runs for one gradient after the other.

`torch.autograd.grad(is_grads_batched=True)` and `jacobian(vectorize=True)` run backward under the vmap of
torch._vmap_internals, `torch.func.vmap` around torch.autograd.grad under functorch's. Neither can look into the ops.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._transforms import in_functorch

_is_batched = torch._C._functorch.is_legacy_batchedtensor


def no_second_derivative(ctx, *grads):
    """Refuse to differentiate a gradient: this is the backward of ops that compute one.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "densenet_ext: a fused stem, dense layer or stage has no second derivative; "
        "build the model with efficient=False to differentiate its gradients"
    )


def one_by_one(run: Callable[..., tuple[Tensor, ...]], *grads: Tensor) -> tuple[Tensor, ...]:
    """Return run(*grads). If grads are batched, run is called for each entry and the outputs are a batch, too."""
    if in_functorch():
        return _Vmap.apply(run, *grads)
    if torch.compiler.is_compiling() or not any(map(_is_batched, grads)):
        return run(*grads)
    # Opening one more level tells the number of the current one.
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    dims = [0 if _is_batched(grad) else None for grad in grads]
    parts = [torch._remove_batch_dim(g, level, 0, 0) if d == 0 else g for g, d in zip(grads, dims, strict=True)]
    outputs = _each(run, parts, dims, next(p.shape[0] for p, d in zip(parts, dims, strict=True) if d == 0))
    return tuple(torch._add_batch_dim(output, 0, level) for output in outputs)


def _each(run: Callable, grads: Sequence[Tensor], dims: Sequence[int | None], count: int) -> tuple[Tensor, ...]:
    grads = [g.expand(count, *g.shape) if d is None else g.movedim(d, 0) for g, d in zip(grads, dims, strict=True)]
    # Each call gets copies, because a block's backward writes into the gradient that it gets.
    each = [one_by_one(run, *(part.clone() for part in parts)) for parts in zip(*grads, strict=True)]
    return tuple(torch.stack(parts) for parts in zip(*each, strict=True))


class _Vmap(torch.autograd.Function):
    """Calls run(*grads) under functorch."""

    @staticmethod
    def forward(run, *grads):
        return run(*grads)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, dims, run, *grads):
        outputs = _each(run, grads, dims[1:], info.batch_size)
        return outputs, (0,) * len(outputs)

    @staticmethod
    def backward(ctx, *grads):
        no_second_derivative(ctx, *grads)
