"""Pure-PyTorch twin of every op: same name, same signature, same out-arguments.

Each kernel op is here in the shortest PyTorch that says it; the compiled kernels are tested against it. `layers.py` and
`stage.py` compose them into the stage ops: the algorithm of the compiled stage, readable and runnable.

Notation of the shapes:
    N samples, H*W = P pixels, M = N*P, C channels of the feature buffer, c the first channels that one layer reads,
    k channels that one layer writes, K2 width of the bottleneck, K2p = K2 rounded up to a multiple of 16,
    S the dtype of feature maps, A the dtype of arithmetic: float64 for float64, else float32.
    A table is [1, channels], or [N, channels] where a mask makes it different for every sample.

Batch normalization is folded into two tables: relu(norm(x)) = relu(scale * x + shift). Its gradient is deferred: the
true gradient of channel c is coef[0] * grad + coef[1] + coef[2] * x, with `coef` [3, N, C] and `grad` [N, C, H, W] in A,
so that the batch-statistics terms of all consumers of a channel cost two numbers a sample instead of a pass over its
pixels.
"""

from .backward import (
    bottleneck_backward,
    conv3x3_backward,
    finish_gradient,
    head_backward,
    squeeze_excite_backward,
    stem_backward,
    transition_backward,
)
from .dense_layer import dense_layer, dense_layer_backward
from .dense_stage import dense_block_backward, dense_stage, dense_stage_backward, dense_tail_backward, new_gradients
from .forward import (
    append,
    bottleneck_forward,
    conv3x3_forward,
    fold_norm,
    head_forward,
    squeeze_excite_forward,
    stem_forward,
    transition_forward,
)

__all__ = [
    "append",
    "bottleneck_backward",
    "bottleneck_forward",
    "conv3x3_backward",
    "conv3x3_forward",
    "dense_block_backward",
    "dense_layer",
    "dense_layer_backward",
    "dense_stage",
    "dense_stage_backward",
    "dense_tail_backward",
    "finish_gradient",
    "fold_norm",
    "head_backward",
    "head_forward",
    "new_gradients",
    "squeeze_excite_backward",
    "squeeze_excite_forward",
    "stem_backward",
    "stem_forward",
    "transition_backward",
    "transition_forward",
]
