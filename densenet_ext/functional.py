"""The fused stem, dense layer and stage as functions of a tensor and the modules that hold the parameters.

Everything around the compiled op is here: checks, autocast, casts, masks, and the running statistics, which change
exactly once a call whatever backward recomputes.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from ._constants import (
    MASK_DROPOUT,
    MASK_PRE_CONV1,
    MASK_PRE_CONV2,
    MASK_PRE_NORM,
    TAIL_HEAD,
    TAIL_NONE,
    TAIL_TRANSITION,
)
from ._layout import arithmetic_dtype
from ._masks import Masks, active_dropout, draw_masks
from ._ops import handles
from ._ops.sync_batch_norm import group_of
from ._running_stats import is_frozen, update_running_statistics
from ._transforms import transform_reason
from .drop_channel import kept_scale


class NotServed(ValueError):
    """Modules that PyTorch serves and one op cannot: `what` says why, of the layer of that index or, None, of the rest."""

    def __init__(self, index: int | None, what: str):
        super().__init__(f"{'the stage' if index is None else f'layers[{index}]'}{what}")
        self.index, self.what = index, what


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def dense_stage(
    x: Tensor,
    layers: Sequence[nn.Module],
    tail_norm: nn.BatchNorm2d | None = None,
    tail_conv: nn.Conv2d | None = None,
    *,
    keep_bottleneck: bool = False,
) -> Tensor:
    """A dense block, and the transition or the head that consumes it, as one differentiable op.

    Layer l of k new channels computes, on the concatenation x_l of x and all earlier layers' outputs,
        y = SE(dropout(conv2(r2 * relu(norm2(conv1(r1 * relu(norm1(q * x_l))))))))
    with Drop-Channel masks q or r1 and r2, and SE only where the layers have them.

    Args:
        x: [N, C0, H, W], float64, float32, bfloat16 or float16, in any memory format; cast as PyTorch would under autocast.
        layers: at least one module with norm1, conv1, norm2, conv2 and, where used, se, drop_channel,
            drop_channel_position and drop_rate, as EfficientDenseLayer has them; all of one width. Norms may also be
            torchvision's FrozenBatchNorm2d. Weights of convolutions have x's dtype, or one that autocast makes so;
            norms have x's dtype, or float32 where x is bfloat16 or float16.
        tail_norm: batch normalization of the consumer, or None for the block alone.
        tail_conv: 1x1 convolution of a transition; None with tail_norm makes the consumer a head.
        keep_bottleneck: keep the outputs of all conv1 for backward. Saves one convolution a layer in backward, costs
            N * H * W * K2 values a layer.

    Returns:
        [N, C0 + L*k, H, W] without a consumer, [N, O, H // 2, W // 2] after a transition: norm, ReLU, 1x1 convolution,
        2x2 average pool; [N, C0 + L*k] after a head: norm, ReLU, global average pool.

    Norms in training mode normalize with the batch's statistics and update their running ones, others use those.

    Raises:
        TypeError: x is no tensor, or x or a parameter is not of those dtypes.
        ValueError: a shape or a device does not fit, or a norm in training mode gets a single value a channel.
        RuntimeError: x is on a CUDA device and this build has no kernels that run there; a transform of torch.func,
            forward-mode differentiation, torch.jit.trace or torch.export is active.
        torch.OutOfMemoryError: there is no room for the result or a workspace; nothing was changed.

    Source: Huang et al., Densely Connected Convolutional Networks, CVPR 2017; Pleiss et al., Memory-Efficient
    Implementation of DenseNets, 2017; Cai et al., arXiv 1904.03392 (Drop-Channel); Hu et al., CVPR 2018 (SE).
    """
    if _is_overridden(x):
        return handle_torch_function(
            dense_stage, (x,), x, layers, tail_norm, tail_conv, keep_bottleneck=keep_bottleneck
        )
    x, casts = _input(x, "x")
    if not layers:
        raise ValueError("layers is empty; it must hold at least one dense layer")
    if tail_conv is not None and tail_norm is None:
        raise ValueError("tail_conv is given without tail_norm; a transition needs both")
    arguments = _Arguments(x, casts, layers)
    channels = x.shape[1]
    for index, layer in enumerate(layers):
        arguments.add_layer(layer, index, channels)
        channels += arguments.growth
    tail = TAIL_NONE
    if tail_norm is not None:
        tail = TAIL_HEAD if tail_conv is None else TAIL_TRANSITION
        arguments.add_norm(tail_norm, channels, "tail_norm")
    if tail_conv is not None:
        if tail_conv.weight.shape[1] != channels:
            raise ValueError(f"tail_conv takes {tail_conv.weight.shape[1]} channels; it must take {channels}")
        if tail_conv.weight.shape[2:] != (1, 1):
            raise NotServed(None, f" has a weight {tuple(tail_conv.weight.shape)}, not of 1x1")
        if x.shape[2] < 2 or x.shape[3] < 2:
            raise ValueError(f"x is {tuple(x.shape)}; a transition needs at least 2x2 pixels")
        arguments.add_weight(tail_conv.weight, "tail_conv.weight")
    arguments.require_plain_parameters()
    keep = keep_bottleneck and torch.is_grad_enabled()
    arguments.draw_masks(layers)
    with _no_autocast(x), handles.memory_errors():
        output, _, stats, _, _ = handles.dense_stage(
            x, *arguments.flat(), tail, keep, _tf32_allowed(x), arguments.shared_by
        )
    arguments.update_running_statistics(stats)
    return output


def dense_layer(inputs: Tensor | Sequence[Tensor], layer: nn.Module, *, keep_bottleneck: bool = False) -> Tensor:
    """One dense layer on the concatenation of `inputs`, as one differentiable op that stores no concatenation.

    Args:
        inputs: tensors [N, C_i, H, W] of one dtype, or a single one.
        layer: as in dense_stage.
        keep_bottleneck: as in dense_stage.

    Returns:
        The layer's k new channels, [N, k, H, W].

    Raises:
        TypeError, ValueError: as in dense_stage.
    """
    inputs = [inputs] if isinstance(inputs, Tensor) else inputs
    if not inputs:
        raise ValueError("inputs is empty; it must hold at least one tensor")
    if _is_overridden(*inputs):
        return handle_torch_function(dense_layer, tuple(inputs), inputs, layer, keep_bottleneck=keep_bottleneck)
    checked = [_input(x, f"inputs[{i}]") for i, x in enumerate(inputs)]
    inputs, casts = [x for x, _ in checked], checked[0][1]
    x, channels = inputs[0], sum(part.shape[1] for part in inputs)
    for i, part in enumerate(inputs):
        if part.device != x.device:
            raise ValueError(f"inputs[{i}] is on {part.device}; it must be on {x.device}, where inputs[0] is")
        if part.dtype != x.dtype or part.shape[0] != x.shape[0] or part.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"inputs[{i}] is {tuple(part.shape)} of {part.dtype}; all inputs must have the samples, the size and "
                f"the dtype of inputs[0], which is {tuple(x.shape)} of {x.dtype}"
            )
    arguments = _Arguments(x, casts, [layer])
    arguments.add_layer(layer, 0, channels)
    arguments.require_plain_parameters()
    arguments.draw_masks([layer])
    keep = keep_bottleneck and torch.is_grad_enabled()
    with _no_autocast(x), handles.memory_errors():
        output, stats, _, _ = handles.dense_layer(
            inputs, *arguments.flat(), keep, _tf32_allowed(x), arguments.shared_by
        )
    arguments.update_running_statistics(stats)
    return output


def dense_stem(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """What follows the convolution of an ImageNet stem, as one differentiable op that stores no map between.

        max_pool2d(relu(norm(x)), kernel_size=3, stride=2, padding=1)

    Args:
        x: [N, C, H, W], as in dense_stage. Copied unless it is channels last.
        norm: batch normalization of C channels, of this process's samples alone.

    Returns:
        [N, C, (H + 1) // 2, (W + 1) // 2]. Running statistics are updated as in dense_stage. Saves the normalized and the
        rectified map and the pool's indices, which backward makes again from x.

    Raises:
        TypeError, ValueError, torch.OutOfMemoryError: as in dense_stage.

    Source: He et al., Deep Residual Learning, CVPR 2016, table 1; Huang et al., CVPR 2017, table 1.
    """
    if _is_overridden(x):
        return handle_torch_function(dense_stem, (x,), x, norm)
    x = _input(x, "x")[0].contiguous(memory_format=torch.channels_last)
    arguments = _Norms(x)
    arguments.add_norm(norm, x.shape[1], "norm")
    if arguments.shared_by >= 0:
        raise ValueError("norm shares its batch statistics with other processes; the fused stem takes its own alone")
    arguments.require_plain_parameters()
    with _no_autocast(x), handles.memory_errors():
        output, stats = handles.dense_stem(x, *arguments.params, arguments.frozen_stats, norm.eps)
    arguments.update_running_statistics(stats)
    return output


class _Norms:
    """Parameters and statistics of batch normalizations, as the ops take them."""

    def __init__(self, x: Tensor):
        self.x, self.dtype = x, arithmetic_dtype(x.dtype)
        self.values = x.shape[0] * x.shape[2] * x.shape[3]
        self.params: list[Tensor] = []
        self.norms: list[nn.Module] = []
        self.widths: list[int] = []
        self.frozen: list[int] = []
        self.frozen_stats: list[Tensor] = []
        self.group: int | None = None  # of the norms that take batch statistics, once there is one

    def own(self, value: Tensor, name: str, width: int) -> Tensor:
        """A norm's parameter or buffer [width], checked, in the dtype of the arithmetic."""
        self.check(value, name, width)
        return (value if value.dtype == self.dtype else value.to(self.dtype)).contiguous()

    def check(self, value: Tensor, name: str, width: int) -> None:
        """A norm's parameter or buffer: as in PyTorch of x's dtype, or of float32 beside lower ones, and of no other."""
        self.check_device(value, name)
        if value.numel() != width:
            raise ValueError(f"{name} has {value.numel()} channels; it must have {width}")
        dtype = value.dtype
        if dtype != self.dtype and dtype != self.x.dtype:
            raise TypeError(_wrong_dtype(value, name, (self.x.dtype, self.dtype), "the input"))

    def check_device(self, value: Tensor, name: str) -> None:
        if value.device != self.x.device:
            raise ValueError(f"{name} is on {value.device}; it must be on {self.x.device}, where the input is")

    def add_norm(self, norm: nn.Module, channels: int, name: str) -> None:
        weight, bias = norm.weight, norm.bias
        x, dtype = self.x, self.dtype
        self.params.append(
            x.new_ones(channels, dtype=dtype) if weight is None else self.own(weight, f"{name}.weight", channels)
        )
        self.params.append(
            x.new_zeros(channels, dtype=dtype) if bias is None else self.own(bias, f"{name}.bias", channels)
        )
        frozen = is_frozen(norm)
        self.frozen.append(int(frozen))
        if frozen:
            self.frozen_stats.append(self.own(norm.running_mean, f"{name}.running_mean", channels))
            self.frozen_stats.append(self.own(norm.running_var, f"{name}.running_var", channels))
        else:
            self.add_group(group_of(norm), name)
            if self.values == 1 and self.group < 0:
                size = torch.Size((1, channels, 1, 1))
                raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
            for statistic in ("running_mean", "running_var"):
                value = norm._buffers.get(statistic)
                if value is not None:
                    self.check(value, f"{name}.{statistic}", channels)
        self.norms.append(norm)
        self.widths.append(channels)

    def require_plain_parameters(self) -> None:
        """A subclass may compute with its values as it likes, and only PyTorch's own functions ask it."""
        if torch.compiler.is_compiling():
            return
        kinds = set(map(type, self.params)) - {Tensor, nn.Parameter}
        if kinds:
            raise NotServed(None, f" has a parameter that is a {kinds.pop().__name__}")

    def add_group(self, group: int, name: str) -> None:
        if self.group not in (None, group):
            raise ValueError(f"{name} shares its batch statistics with other processes than the norms before it do")
        self.group = group

    @property
    def shared_by(self) -> int:
        """The group of processes that share batch statistics, -1 for none."""
        return -1 if self.group is None else self.group

    def update_running_statistics(self, stats: Tensor) -> None:
        """From what the op returned; of shared statistics its last column has the values a channel."""
        if self.shared_by >= 0:
            update_running_statistics(self.norms, self.widths, stats[:, :-1], stats[0, -1])
        else:
            update_running_statistics(self.norms, self.widths, stats, self.values)


class _Arguments(_Norms):
    """The flat lists that the ops of stage and layer take, gathered from modules."""

    def __init__(self, x: Tensor, casts: bool, layers: Sequence[nn.Module]):
        super().__init__(x)
        first = layers[0]
        self.casts = casts  # whether autocast would give weights x's dtype
        self.growth, self.width = first.conv2.weight.shape[0], first.conv1.weight.shape[0]
        se = getattr(first, "se", None)
        self.hidden = None if se is None else se.fc1.weight.shape[0]
        self.dropout = active_dropout(first)
        self.masks: list[Masks] = []
        self.channels: list[int] = []

    def add_weight(self, value: Tensor, name: str) -> None:
        """A parameter of a convolution: of x's dtype, as a convolution takes it."""
        self.check_device(value, name)
        dtype, own = value.dtype, self.x.dtype
        if dtype != own and not (self.casts and dtype.is_floating_point and dtype != torch.float64):
            raise TypeError(_wrong_dtype(value, name, (own,), "the input"))
        self.params.append((value if dtype == self.dtype else value.to(self.dtype)).contiguous())

    def add_layer(self, layer: nn.Module, index: int, channels: int) -> None:
        conv1, conv2, se, name = layer.conv1.weight, layer.conv2.weight, getattr(layer, "se", None), f"layers[{index}]"
        width, growth = conv1.shape[0], conv2.shape[0]
        if (width, growth) != (self.width, self.growth):
            raise NotServed(
                index,
                f" has {width} channels in the bottleneck and {growth} new ones, the first layer {self.width} and "
                f"{self.growth}",
            )
        if conv1.shape[2:] != (1, 1) or conv2.shape[2:] != (3, 3):
            raise NotServed(index, f" has weights {tuple(conv1.shape)} and {tuple(conv2.shape)}, not of 1x1 and of 3x3")
        if conv2.shape[1] != width:
            raise ValueError(f"{name}.conv2.weight takes {conv2.shape[1]} channels; it must take {width}")
        hidden = None if se is None else se.fc1.weight.shape[0]
        if hidden != self.hidden:
            raise NotServed(
                index, f" has squeeze-and-excitation to {hidden} channels, the first layer to {self.hidden}"
            )
        dropout = active_dropout(layer)
        if dropout != self.dropout:
            raise NotServed(index, f" has drop_rate {dropout}, the first layer {self.dropout}")
        self.add_norm(layer.norm1, channels, f"{name}.norm1")
        self.add_weight(conv1, f"{name}.conv1.weight")
        self.add_norm(layer.norm2, self.width, f"{name}.norm2")
        self.add_weight(conv2, f"{name}.conv2.weight")
        if se is not None:
            for part, fc in (("fc1", se.fc1), ("fc2", se.fc2)):
                self.add_weight(fc.weight, f"{name}.se.{part}.weight")
                self.add_weight(fc.bias, f"{name}.se.{part}.bias")
        self.channels.append(channels)

    def draw_masks(self, layers: Sequence[nn.Module]) -> None:
        """After all checks, so that a call that fails draws nothing."""
        for layer, channels in zip(layers, self.channels, strict=True):
            self.masks.append(draw_masks(layer, self.x, channels))

    def flat(self) -> tuple:
        """params, masks, frozen_stats, mask_kind, dropout_scale, eps, frozen, squeeze_excite, in the ops' order."""
        kinds = (MASK_PRE_NORM, MASK_PRE_CONV1, MASK_PRE_CONV2, MASK_DROPOUT)
        used = [i for i in range(4) if any(masks[i] is not None for masks in self.masks)]
        masks = [self._mask(layer, i) for layer in range(len(self.masks)) for i in used]
        return (
            self.params,
            masks,
            self.frozen_stats,
            sum(kinds[i] for i in used),
            kept_scale(self.dropout),
            [norm.eps for norm in self.norms],
            self.frozen,
            self.hidden is not None,
        )

    def _mask(self, layer: int, kind: int) -> Tensor:
        """That mask of that layer; ones where only other layers have one."""
        mask = self.masks[layer][kind]
        if mask is None:
            channels = self.width if kind == 2 else self.channels[layer]
            mask = self.x.new_ones((self.x.shape[0], channels), dtype=self.dtype)
        return mask


def _is_overridden(*inputs: Tensor) -> bool:
    """Whether a subclass of Tensor says what becomes of these inputs, as in every function of PyTorch."""
    return any(type(x) is not Tensor and type(x) is not nn.Parameter for x in inputs) and has_torch_function(inputs)


def _input(x: Tensor, name: str) -> tuple[Tensor, bool]:
    """x, checked, in the dtype that autocast asks for, and whether autocast asks for one."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be a tensor")
    reason = transform_reason()
    if reason is not None:
        raise RuntimeError(f"densenet_ext.functional cannot be used: {reason}; call the module, or efficient=False")
    if x.dim() != 4:
        raise ValueError(f"{name} has {x.dim()} dimensions; it must have 4: [N, C, H, W]")
    if x.shape[1] == 0 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{name} is {tuple(x.shape)}; only the number of samples may be 0")
    if x.dtype not in DTYPES:
        raise TypeError(_wrong_dtype(x, name, DTYPES))
    handles.require_kernels(x)
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        x = x.as_subclass(Tensor)
    if x.dtype == torch.float64 or not _autocasts(x):
        return x, False
    return x.to(torch.get_autocast_dtype(x.device.type)), True


def _wrong_dtype(value: Tensor, name: str, dtypes: Sequence[torch.dtype], like: str = "") -> str:
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes))
    actual = str(value.dtype).removeprefix("torch.")
    return f"{name} is of {actual}; it may be of {names}" + (f", as {like} is" if like else "")


def _tf32_allowed(x: Tensor) -> bool:
    """Whether products of float32 may be of TF32: what PyTorch's own convolutions on that device do."""
    if x.device.type != "cuda":
        return False
    from ._ops.precision import cudnn_uses_tf32  # imports the compiler, which takes seconds: not before it is needed

    return cudnn_uses_tf32()


def _autocasts(x: Tensor) -> bool:
    return x.device.type in handles.DEVICES and torch.is_autocast_enabled(x.device.type)


def _no_autocast(x: Tensor):
    """Autocast has done its part in _input: what the op calls inside keeps its dtypes."""
    if _autocasts(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
