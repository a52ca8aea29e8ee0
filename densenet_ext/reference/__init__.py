"""Pure-PyTorch twin of every op: same name, same signature, same out-arguments.

Each kernel op is here in the shortest PyTorch that says it; compiled kernels are tested against it. `dense_stage.py`
and `dense_layer.py` compose them into the stage ops: the algorithm of the compiled stage, readable and runnable.

Notation of the shapes:
    N samples, H*W = P pixels, M = N*P, C channels of the feature buffer, c the first channels that one layer reads,
    k channels that one layer writes, K2 width of the bottleneck, K2p = K2 rounded up to a multiple of 16,
    S the dtype of feature maps, A the dtype of arithmetic: float64 for float64, else float32.

Batch normalization is folded into a scale and a shift: relu(norm(x)) = relu(scale * x + shift). Both are [1, channels],
or [N, channels] where a mask makes them different for every sample. The gradient of batch statistics is deferred: the
true gradient of a channel is coef[0] * grad + coef[1] + coef[2] * x, with coef [3, N, C] and grad [N, C, H, W] in A.
So for each layer that reads a channel, these statistics cost two numbers a sample instead of a pass over the pixels.
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
