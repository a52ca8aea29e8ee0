"""DenseNet-BC as a module, and the five variants of it that the hybrid approach compares."""

import math
import numbers
import operator
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from . import _reasons, fallback
from ._checks import check_positive
from ._efficient_module import EfficientModule
from ._features import run_features
from ._patches import watch
from ._state_dicts import rename_network_keys, short_error
from ._transforms import is_symbolic, refuse_scripting
from .layers import EfficientDenseBlock, Transition

# A: Drop-Channel in place of dropout; B: squeeze-and-excitation; C: the memory-efficient implementation.
VARIANTS = {
    "vanilla": {"drop_rate": 0.2},
    "A": {"drop_channel": 0.2},
    "B": {"drop_rate": 0.2, "se_reduction": 16},
    "A+B": {"drop_channel": 0.2, "se_reduction": 16},
    "A+B+C": {"drop_channel": 0.2, "se_reduction": 16, "efficient": "fused"},
}


class DenseFeatures(nn.Sequential):
    """Stem, dense blocks, transitions and last norm of a network, in order. A slice is a part of such a network.

    If a block's `efficient` is 'fused', norm, ReLU and max pool of the stem are one op, and so is each such block with
    the transition after it.
    """

    def forward(self, x: Tensor) -> Tensor:
        return run_features(self._modules, x)[0]


# A network whose head is fused into its last stage does not call its features.
watch((DenseFeatures, "forward"))


class DenseNetBC(EfficientModule):
    """DenseNet with bottlenecks and compression; its parameters have torchvision's names.

        logits = classifier(global average pool(relu(norm5(block_b(... transition_1(block_1(stem(x))))))))

    Args:
        growth_rate: k, new channels of a dense layer; at least 1.
        depth: 6 * n + 4 for three dense blocks of n >= 1 layers; 100 unless block_config is passed.
        compression: theta, a transition has floor(theta * channels) outputs; 0 < theta <= 1.
        num_classes: outputs of the classifier; at least 1.
        bn_size: width of the bottlenecks in units of k; at least 1.
        drop_rate: probability that a single output value of a dense layer is dropped; 0 <= drop_rate < 1.
        drop_channel: probability that a whole channel is dropped; 0 <= drop_channel < 1.
        drop_channel_position: 'pre_norm': before the first norm of a dense layer; 'pre_conv': before its convolutions.
        se_reduction: reduction of squeeze-and-excitation at the end of each dense layer, at least 1, or None for none.
        efficient: False: plain PyTorch. 'checkpoint': compute concatenations and first norms again in backward; avoids
            storing most activations, costs about a sixth of the time. 'fused', or True: one op for each dense block
            and the transition or head after it; avoids storing nearly all activations. set_fallback says what happens
            where that op cannot serve.
        keep_bottleneck: with 'fused', the bottlenecks that are kept for backward; avoids a convolution a layer in
            backward, costs N * H * W * bn_size * k values of memory a layer. 'auto': those that do not raise the peak;
            True: all; False: none; a number: so many last layers of each block. `plan` chooses within a budget.
        small_inputs: True: 3x3 convolution of stride 1 as stem, for images such as 32x32; False: 7x7 of stride 2, norm,
            ReLU, 3x3 max pool of stride 2.
        in_channels: channels of the images; at least 1.
        num_init_features: channels after the stem, at least 1; None for 2 * growth_rate.
        block_config: layers of each dense block, in place of depth, such as (6, 12, 24, 16) for DenseNet-121, which the
            function densenet121 builds.
        eps, momentum: of all norms, as in torch.nn.BatchNorm2d.

    Shape: [N, in_channels, H, W] to [N, num_classes].

    Raises:
        ValueError: an argument is out of range, or depth and block_config are both passed.

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
        keep_bottleneck: bool | int | str = "auto",
        small_inputs: bool = True,
        in_channels: int = 3,
        num_init_features: int | None = None,
        block_config: Sequence[int] | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
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
            block._prefix = f"features.denseblock{i}."
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
    def variant(cls, name: str, **options: Any) -> "DenseNetBC":
        """Build one of the five networks of the hybrid approach.

        Args:
            name: 'vanilla': dropout with probability 0.2; 'A': Drop-Channel with probability 0.2 in place of dropout;
                'B': 'vanilla' with squeeze-and-excitation; 'A+B': both; 'A+B+C': both, fused.
            options: arguments of DenseNetBC; they override the variant's.

        Raises:
            ValueError: there is no such variant, or an argument is out of range.
            TypeError: DenseNetBC has no such argument.

        Source: A Hybrid Approach to Image Classification on Densely Connected Convolutional Networks, section 3.6, which has
        Drop-Channel's probability; dropout's is that of Huang et al., CVPR 2017, section 4.2.
        """
        if name not in VARIANTS:
            raise ValueError(f"the variant is {name!r}; it may be {', '.join(map(repr, VARIANTS))}")
        return cls(**{**VARIANTS[name], **options})

    def forward(self, x: Tensor) -> Tensor:
        features, pooled = self.features, False
        if self.efficient != "fused" or is_symbolic(x):
            x = features(x)
        else:
            kind = nn.Sequential if type(features) is nn.Sequential else DenseFeatures
            reason = _reasons.module_reason(features, "", "features", kind)
            if reason is None:
                x, pooled = run_features(features._modules, x, head=True)
            else:
                fallback.report(reason)
                x = features(x)
        if not pooled:
            x = F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1)
        return self.classifier(x)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load parameters and buffers as torch.nn.Module does, with the keys that others use, too.

        These are the keys of torchvision's files of 2017, of wrappers ('module.', '_orig_mod.' in front) and of MONAI.

        Raises:
            RuntimeError: keys or shapes do not fit, as in torch.nn.Module; the message names the first ones.
        """
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            raise short_error(error) from None

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: object) -> None:
        known = {name for name, _ in chain(self.named_parameters(), self.named_buffers())}
        rename_network_keys(state_dict, prefix, known)
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
        raise ValueError(f"depth is {depth} and block_config is {block_config}; only one of them may be passed")
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
    """Initialize as torchvision: He et al.'s normal distribution for convolutions, biases 0, norms the identity."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
