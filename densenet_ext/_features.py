"""Run a network's features: module by module, or several modules at once by one op.

Two groups of modules are fused: norm, ReLU and max pool of the stem, and a dense block with the transition after it, or
with the last norm and the rest of the head.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import _reasons, _sharding, fallback, functional
from ._layout import arithmetic_dtype, gradient_dtype
from ._ops import handles
from ._plain_layer import norm_relu
from ._planning.order import StageSize, free_layers
from ._running_stats import applies_activation
from ._transforms import is_recording, is_symbolic

_Named = list[tuple[str, nn.Module]]


class Consumer(NamedTuple):
    """The module after a dense block, which may be the tail of its stage."""

    reason: str | None  # why it cannot be the tail
    modules: Callable[[], tuple[nn.Module, ...]]  # norm and convolution of a transition, norm of a head
    is_head: bool = False


_observers: list[Callable[["FusedBlock"], object]] = []


@contextmanager
def observed(observe: Callable[["FusedBlock"], object]) -> Iterator[None]:
    """Call observe(block) in this context for each block that runs as one op."""
    _observers.append(observe)
    try:
        yield
    finally:
        _observers.remove(observe)


class StageInput(NamedTuple):
    """A stage's input and its tail: what a sharded block is called with. FSDP2 may cast x inside.

    free: how many layers keep their bottleneck if the block's keep_bottleneck is 'auto'.
    """

    x: Tensor
    tail: tuple[nn.Module, ...]
    free: int


class FusedBlock:
    """A dense block that can be one op with its consumer: this package's, or a converted one.

    Called with a StageInput, which a block is only where FSDP2 has sharded it, `forward` returns what `fused` does.
    """

    runs_fused = True  # False while its modules are to be called
    keep_bottleneck: bool | int | str  # that of dense_stage, or 'auto'

    def fallback_reason(self, x: Tensor) -> str | None:
        """Return why the fused op cannot compute this block for x [N, C0, H, W], or None if it can."""
        raise NotImplementedError

    def called_reason(self, prefix: str, name: str) -> str | None:
        """Return why the block itself has to be called, or None; it is `name` after the prefix `prefix`."""
        raise NotImplementedError

    def consumer(self, name: str, module: nn.Module, path: str) -> Consumer | None:
        """Return what a stage needs of the module after this block, or None if that can be no tail."""
        raise NotImplementedError

    def sharing_reason(self, path: str, norm: nn.Module) -> str | None:
        """Check that the norm at `path` shares batch statistics with the same processes as this block's norms."""
        raise NotImplementedError

    def run_fused(self, x: Tensor, *tail: nn.Module, free: int = 0) -> Tensor | None:
        """Call `fused`, and tell those who observe. free: how many layers keep their bottleneck for 'auto'."""
        for observe in _observers:
            observe(self)
        return self.fused(x, *tail, keep=free if self.keep_bottleneck == "auto" else self.keep_bottleneck)

    def dense_layers(self) -> Sequence[object]:
        """Return the dense layers, each with conv1 and conv2."""
        raise NotImplementedError

    def fused(self, x: Tensor, *tail: nn.Module, keep: bool | int) -> Tensor | None:
        """Compute the block and its tail by one op. `tail` holds the norm and the convolution of a transition, the norm
        of a head, or nothing; keep: keep_bottleneck of dense_stage.

        `fallback_reason` has to be None for x. If the layers differ too much for one op, reports that and returns None.
        """
        raise NotImplementedError


def run_features(
    modules: dict[str, nn.Module], x: Tensor, head: bool = False, prefix: str = "features."
) -> tuple[Tensor, bool]:
    """Run the modules in order, fused where the fused implementation serves them.

    head: True if the last stage may include the head (norm5, ReLU, global average pool). prefix: stands before the
    modules' names in messages. Returns the output, and True if the last stage did include the head.
    """
    rest, pooled, free = list(modules.items()), False, None
    fuses = any(_is_fused_block(module) for module in modules.values()) and not is_symbolic(x)
    if fuses and (rest[0][0] == "conv0" or type(rest[0][1]) is nn.Conv2d):
        x = _to_channels_last(x)
    while rest:
        y, count = None, 0
        if fuses:
            if stem := _stem(rest):
                y, count = _run_stem(stem, x, prefix)
            else:
                if free is None and _is_fused_block(rest[0][1]):
                    free = _free_layers(rest, x) if head else {}
                y, count = _run_stage(rest, x, head, prefix, (free or {}).get(rest[0][1], 0))
                pooled = y is not None and y.dim() == 2
        if y is None:
            y, count = _run_modules(rest, x)
        x = y
        del rest[:count]
    return x, pooled


def _is_fused_block(module: nn.Module) -> bool:
    return isinstance(module, FusedBlock) and module.runs_fused


def _free_layers(modules: _Named, x: Tensor) -> dict[nn.Module, int]:
    """Return for each block of the modules, the rest of a network, how many layers keep their bottleneck at no cost.

    x: the input of the first one. The result is empty where no block asks for it, where nothing is kept for backward,
    under torch.compile, which plans memory itself, and where something else than transitions stands between the blocks.
    """
    blocks = [module for _, module in modules if _is_fused_block(module)]
    if not torch.is_grad_enabled() or all(block.keep_bottleneck != "auto" for block in blocks):
        return {}
    if len(modules) != 2 * len(blocks):
        return {}
    if torch.compiler.is_compiling() or is_recording() or not isinstance(x, Tensor) or x.dim() != 4:
        return {}
    if x.device.type not in handles.DEVICES:
        return {}
    casts = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(x.device.type) if casts else x.dtype
    bytes_of = {
        "value": dtype.itemsize,
        "gradient": gradient_dtype(torch.empty(0, dtype=dtype, device=x.device)).itemsize,
    }
    sizes, spatial = [], x.shape[2:]
    for i, block in enumerate(blocks):
        (_, module), (consumer_name, consumer) = modules[2 * i : 2 * i + 2]
        # A convolution's sizes are attributes; its weight may be computed when it is asked for.
        pairs = [(getattr(m, "conv1", None), getattr(m, "conv2", None)) for m in block.dense_layers()]
        if module is not block or not pairs or not all(type(conv) is nn.Conv2d for pair in pairs for conv in pair):
            return {}
        if block.consumer(consumer_name, consumer, consumer_name) is None:
            return {}
        first, last = pairs[0]
        width, growth = first.out_channels, last.out_channels
        parameters = sum(width * (conv1.in_channels + 9 * growth) for conv1, _ in pairs)
        bytes_of["parameters"] = parameters * arithmetic_dtype(dtype).itemsize
        rows = x.shape[0] * math.prod(spatial)
        sizes.append(StageSize(rows, first.in_channels, growth, width, len(pairs), **bytes_of))
        spatial = [size // 2 for size in spatial]
    return dict(zip(blocks, free_layers(tuple(sizes)), strict=True))


def _names(modules: _Named) -> list[str]:
    return [name for name, _ in modules]


def _stem(rest: _Named) -> _Named:
    """Return norm, ReLU, unless it is part of the norm, and max pool of a stem if these come next, else nothing."""
    if _names(rest[:3]) == ["norm0", "relu0", "pool0"]:
        return rest[:3]
    kinds = [type(module) for _, module in rest[:3]]
    if kinds == [nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]:
        return rest[:3]
    return rest[:2] if kinds[1:2] == [nn.MaxPool2d] and applies_activation(kinds[0]) else []


def _run_modules(rest: _Named, x: Tensor) -> tuple[Tensor, int]:
    """Call the first of these modules, or the stem's norm and ReLU. Returns the output and how many were called."""
    if _names(rest[:2]) == ["norm0", "relu0"]:
        return norm_relu(rest[0][1], rest[1][1], x), 2
    return rest[0][1](x), 1


def _to_channels_last(x: Tensor) -> Tensor:
    """Convert the images to channels last, so that conv0's output has the layout that the next op reads.

    On a CPU oneDNN would otherwise compute a planar output in another layout first, and copy it.
    """
    if not isinstance(x, Tensor) or x.dim() != 4 or _reasons.call_reason([x]) is not None:
        return x
    x = x.contiguous(memory_format=torch.channels_last)
    if x.shape[1] == 1:  # planar and channels last at once: PyTorch tells by the strides which is meant
        x = x.reshape(x.shape[0], *x.shape[2:], 1).permute(0, 3, 1, 2)
    return x


def _run_stem(stem: _Named, x: Tensor, prefix: str) -> tuple[Tensor | None, int]:
    """Run norm, ReLU and max pool by one op. Returns its output and how many modules these are.

    Returns (None, 0) if one op cannot serve them, which it reports.
    """
    reason = _reasons.stem_reason([(f"{prefix}{name}", module) for name, module in stem], x)
    if reason is None:
        try:
            return functional.dense_stem(x, stem[0][1]), len(stem)
        except functional.NotServed as error:
            reason = f"the stem{error.what}"
    fallback.report(reason)
    return None, 0


def _run_stage(rest: _Named, x: Tensor, head: bool, prefix: str, free: int) -> tuple[Tensor | None, int]:
    """Run a block and its tail by one op. Returns its output and 2, or (None, 0) if these modules are no stage."""
    if len(rest) < 2:
        return None, 0
    (name, block), (consumer_name, module) = rest[:2]
    if not _is_fused_block(block):
        return None, 0
    path = f"{prefix}{consumer_name}"
    consumer = block.consumer(consumer_name, module, path)
    if consumer is None or (consumer.is_head and not (head and len(rest) == 2)):
        return None, 0
    reason = _sharding.tail_reason(module, path) or consumer.reason or block.called_reason(prefix, name)
    if reason is None:
        if block.fallback_reason(x) is not None:
            return None, 0  # the block reports the reason when it is called
        tail = consumer.modules()
        reason = block.sharing_reason(path, tail[0])
        reason = reason or _sharding.precision_reason(block, x.dtype, tail, f"{prefix}{name}", path)
    if reason is not None:
        fallback.report(reason)
        return None, 0
    if _sharding.is_sharded(block):
        return block(StageInput(x, tail, free)), 2
    return block.run_fused(x, *tail, free=free), 2
