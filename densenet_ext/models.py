"""DenseNet-BC, and the variants of it that the hybrid approach compares."""

import math
import numbers
import operator
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import fallback, functional
from ._checks import check_efficient, check_positive
from ._patches import watch
from ._state_dicts import rename_network_keys, short_error
from ._transforms import is_symbolic, refuse_scripting
from .layers import EfficientDenseBlock, EfficientDenseLayer, Transition, norm_relu

# A: Drop-Channel in place of dropout; B: squeeze-and-excitation; C: the memory-efficient implementation.
VARIANTS = {
    "vanilla": {"drop_rate": 0.2},
    "A": {"drop_channel": 0.2},
    "B": {"drop_rate": 0.2, "se_reduction": 16},
    "A+B": {"drop_channel": 0.2, "se_reduction": 16},
    "A+B+C": {"drop_channel": 0.2, "se_reduction": 16, "efficient": "fused"},
}


class DenseFeatures(nn.Sequential):
    """Stem, dense blocks, transitions and last norm of a network, in order; slices are networks cut short.

    With blocks whose `efficient` is 'fused', norm, ReLU and max pool of the stem are one op, and each block with the
    transition after it.
    """

    def forward(self, x: Tensor) -> Tensor:
        return run_features(self._modules, x)[0]


def run_features(modules: dict[str, nn.Module], x: Tensor, head: bool = False) -> tuple[Tensor, bool]:
    """The modules one after the other, fused where the fused implementation serves them.

    Returns the output, and whether the head (the last norm, ReLU, global average pool) is in it, which only `head` allows.
    """
    rest = list(modules.items())
    fused = any(isinstance(m, EfficientDenseBlock) and m.efficient == "fused" for _, m in rest) and not is_symbolic(x)
    if fused and rest[0][0] == "conv0":
        x = _images(x)
    while rest:
        (name, module), after = rest.pop(0), [n for n, _ in rest]
        if name == "norm0" and after[:1] == ["relu0"]:
            stem = fused and after[:2] == ["relu0", "pool0"] and _stem([(name, module), *rest[:2]], x)
            if isinstance(stem, Tensor):
                x = stem
                del rest[:2]
            else:
                x = norm_relu(module, rest.pop(0)[1], x)
            continue
        tail = _tail_of(name, module, rest, x, head) if fused else None
        y = None if tail is None else module.fused(x, *tail)
        if y is None:
            x = module(x)
        elif len(tail) == 1:
            return y, True
        else:
            x = y
            rest.pop(0)
    return x, False


def _images(x: Tensor) -> Tensor:
    """x as conv0 gets it: channels last, which makes its output so, as the ops after it read it. (On a CPU oneDNN computes
    a planar output in another layout first and then copies it.)"""
    if not isinstance(x, Tensor) or x.dim() != 4 or fallback.call_reason([x]) is not None:
        return x
    x = x.contiguous(memory_format=torch.channels_last)
    if x.shape[1] == 1:  # in either layout; the strides have to tell which is meant
        x = x.reshape(x.shape[0], *x.shape[2:], 1).permute(0, 3, 1, 2)
    return x


def _stem(modules: list[tuple[str, nn.Module]], x: Tensor) -> Tensor | None:
    """norm0, relu0 and pool0 by one op; None, and a report, where something hinders that."""
    reason = fallback.stem_reason([(f"features.{name}", module) for name, module in modules], x)
    if reason is None:
        try:
            return functional.dense_stem(x, modules[0][1])
        except functional.NotServed as error:
            reason = f"the stem{error.what}"
    fallback.report(reason)
    return None


def _tail_of(name: str, block: nn.Module, rest: list, x: Tensor, head: bool) -> tuple[nn.Module, ...] | None:
    """The norm, and the convolution if any, of what follows a block; None where both cannot be fused into a stage."""
    if not isinstance(block, EfficientDenseBlock) or block.efficient != "fused" or not (rest and block.layers):
        return None
    tail_name, tail = f"features.{rest[0][0]}", rest[0][1]
    if rest[0][0].startswith("transition"):
        reason = fallback.transition_reason(tail, tail_name, Transition)
    elif rest[0][0] == "norm5" and len(rest) == 1 and head:
        reason = fallback.norm_reason(tail, "", tail_name)
    else:
        return None
    reason = reason or fallback.module_reason(block, "features.", name, EfficientDenseBlock)
    if reason is None:
        if block.fallback_reason(x) is not None:
            return None  # the block reports it
        tail = (tail.norm, tail.conv) if isinstance(tail, Transition) else (tail,)
        reason = fallback.sharing_reason(block._modules, block.name, (tail_name, tail[0]))
    if reason is not None:
        fallback.report(reason)
        return None
    return tail


# A network with the head in its last stage does not call its features.
watch((DenseFeatures, "forward"))


class DenseNetBC(nn.Module):
    """DenseNet with bottlenecks and compression; its parameters have torchvision's names.

    Args:
        growth_rate: k, new channels of a dense layer.
        depth: 6 * n + 4 for three dense blocks of n layers; 100 unless block_config is given.
        compression: theta, a transition has floor(theta * channels) outputs; 0 < theta <= 1.
        num_classes: outputs of the classifier.
        bn_size: width of the bottlenecks in units of k.
        drop_rate: probability of a single output value of a dense layer to be dropped, in [0, 1).
        drop_channel: probability of a whole channel to be dropped, in [0, 1).
        drop_channel_position: 'pre_norm': before the first norm of a dense layer; 'pre_conv': before its convolutions.
        se_reduction: reduction of squeeze-and-excitation at the end of each dense layer, or None for none.
        efficient: False: plain PyTorch. 'checkpoint': recompute concatenations and first norms in backward; saves most
            activations, costs about a sixth of the time. 'fused': one op for each dense block and its consumer; saves
            nearly all activations. Where that op cannot serve a module or an input, see set_fallback.
        keep_bottleneck: with 'fused', keep the bottlenecks for backward; saves a convolution a layer, costs
            N * H * W * bn_size * k values a layer.
        small_inputs: True: 3x3 convolution of stride 1 as stem, for images such as 32x32; False: 7x7 of stride 2, norm,
            ReLU, 3x3 max pool of stride 2.
        in_channels: channels of the images.
        num_init_features: channels after the stem; 2 * growth_rate unless given.
        block_config: layers of each dense block, in place of depth. (6, 12, 24, 16) with growth_rate=32,
            num_init_features=64, num_classes=1000, small_inputs=False is DenseNet-121.
        eps, momentum: of all norms, as in torch.nn.BatchNorm2d.

    Shape: [N, in_channels, H, W] to [N, num_classes].

    Raises:
        ValueError: an argument is out of range, or both depth and block_config are given.

    Source: Huang et al., Densely Connected Convolutional Networks, CVPR 2017, sections 3 and 4.
    """

    def __init__(
        self,
        growth_rate: int = 12,
        depth: int | None = None,
        compression: float = 0.5,
        num_classes: int = 100,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        drop_channel: float = 0.0,
        drop_channel_position: str = "pre_norm",
        se_reduction: int | None = None,
        efficient: bool | str = False,
        keep_bottleneck: bool = False,
        small_inputs: bool = True,
        in_channels: int = 3,
        num_init_features: int | None = None,
        block_config: Sequence[int] | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ):
        super().__init__()
        growth_rate = check_positive(growth_rate, "growth_rate")
        in_channels = check_positive(in_channels, "in_channels")
        num_classes = check_positive(num_classes, "num_classes")
        blocks = _block_config(depth, block_config)
        if not isinstance(compression, numbers.Real) or not 0 < compression <= 1:
            raise ValueError(f"compression is {compression!r}; it must be more than 0 and at most 1")
        channels = 2 * growth_rate if num_init_features is None else num_init_features
        channels = check_positive(channels, "num_init_features")
        norm = {"eps": eps, "momentum": momentum}
        layer = dict(
            drop_rate=drop_rate,
            drop_channel=drop_channel,
            drop_channel_position=drop_channel_position,
            se_reduction=se_reduction,
            **norm,
        )
        self.features = DenseFeatures(_stem_modules(in_channels, channels, small_inputs, norm))
        for i, count in enumerate(blocks, 1):
            block = EfficientDenseBlock(count, channels, growth_rate, bn_size, **layer)
            block.name = f"features.denseblock{i}."
            self.features.add_module(f"denseblock{i}", block)
            channels += count * growth_rate
            if i < len(blocks):
                out_channels = math.floor(compression * channels)
                self.features.add_module(f"transition{i}", Transition(channels, out_channels, **norm))
                channels = out_channels
        self.features.add_module("norm5", nn.BatchNorm2d(channels, **norm))
        self.classifier = nn.Linear(channels, num_classes)
        self.efficient = efficient
        self.keep_bottleneck = keep_bottleneck
        self.apply(_initialize)

    @classmethod
    def variant(cls, name: str, **options) -> "DenseNetBC":
        """One of the five networks of the hybrid approach.

        Args:
            name: 'vanilla': dropout with probability 0.2; 'A': Drop-Channel with probability 0.2 in place of dropout;
                'B': 'vanilla' with squeeze-and-excitation; 'A+B': both; 'A+B+C': both, fused.
            options: any argument of DenseNetBC, before the variant's own.

        Raises:
            ValueError: there is no such variant.

        Source: A Hybrid Approach to Image Classification on Densely Connected Convolutional Networks. The probabilities
        are those of dropout in Huang et al., CVPR 2017.
        """
        if name not in VARIANTS:
            raise ValueError(f"name is {name!r}; it may be {', '.join(map(repr, VARIANTS))}")
        return cls(**{**VARIANTS[name], **options})

    @property
    def efficient(self) -> bool | str:
        """False, 'checkpoint' or 'fused'; may be changed at any time."""
        return self._efficient

    @efficient.setter
    def efficient(self, value: bool | str) -> None:
        self._efficient = check_efficient(value)
        for module in self._dense_modules():
            module.efficient = value

    @property
    def keep_bottleneck(self) -> bool:
        """Whether 'fused' keeps the bottlenecks for backward; may be changed at any time."""
        return self._keep_bottleneck

    @keep_bottleneck.setter
    def keep_bottleneck(self, value: bool) -> None:
        self._keep_bottleneck = bool(value)
        for module in self._dense_modules():
            module.keep_bottleneck = value

    def _dense_modules(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, EfficientDenseBlock | EfficientDenseLayer)]

    def forward(self, x: Tensor) -> Tensor:
        features, pooled = self.features, False
        if self.efficient != "fused" or is_symbolic(x):
            x = features(x)
        else:
            kind = nn.Sequential if type(features) is nn.Sequential else DenseFeatures
            reason = fallback.module_reason(features, "", "features", kind)
            if reason is None:
                x, pooled = run_features(features._modules, x, head=True)
            else:
                fallback.report(reason)
                x = features(x)
        if not pooled:
            x = F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1)
        return self.classifier(x)

    def load_state_dict(self, state_dict: Mapping, strict: bool = True, assign: bool = False):
        """As torch.nn.Module; also with the keys of older files, of wrappers ('module.', '_orig_mod.') and of MONAI."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            raise short_error(error) from None

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest) -> None:
        rename_network_keys(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    __prepare_scriptable__ = refuse_scripting


def _block_config(depth: int | None, block_config: Sequence[int] | None) -> list[int]:
    if block_config is None:
        try:
            number = 100 if depth is None else operator.index(depth)
        except TypeError:
            number = 0
        if number < 10 or (number - 4) % 6:
            raise ValueError(f"depth is {depth!r}; it must be 6 * n + 4 with n at least 1, such as 40 or 100")
        return [(number - 4) // 6] * 3
    if depth is not None:
        raise ValueError(f"depth is {depth} and block_config is {block_config}; only one of them may be given")
    try:
        block_config = list(block_config)
    except TypeError:
        raise ValueError(f"block_config is {block_config!r}; it must hold numbers of layers") from None
    if not block_config:
        raise ValueError("block_config is empty; it must hold the number of layers of at least one block")
    return [check_positive(count, f"block_config[{i}]") for i, count in enumerate(block_config)]


def _stem_modules(in_channels: int, channels: int, small_inputs: bool, norm: dict) -> OrderedDict:
    if small_inputs:
        return OrderedDict(conv0=nn.Conv2d(in_channels, channels, 3, padding=1, bias=False))
    return OrderedDict(
        conv0=nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False),
        norm0=nn.BatchNorm2d(channels, **norm),
        relu0=nn.ReLU(),
        pool0=nn.MaxPool2d(3, stride=2, padding=1),
    )


def _initialize(module: nn.Module) -> None:
    """As torchvision: He et al.'s normal distribution for convolutions, biases 0, norms the identity."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
