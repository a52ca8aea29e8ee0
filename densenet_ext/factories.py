"""The networks that papers and libraries name, as functions that return a DenseNetBC."""

from typing import TYPE_CHECKING, TypedDict

from .models import DenseNetBC

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet_bc_100_12",
    "densenet_bc_190_40",
    "densenet_bc_250_24",
    "hybrid_densenet",
]


class NetworkOptions(TypedDict, total=False):
    """The arguments of DenseNetBC that do not make a network another one; help(DenseNetBC) has their ranges."""

    in_channels: int
    drop_rate: float
    drop_channel: float
    drop_channel_position: str
    se_reduction: int | None
    efficient: bool | str
    keep_bottleneck: bool | int | str
    small_inputs: bool
    eps: float
    momentum: float | None


class HybridOptions(NetworkOptions, total=False):
    """All keyword arguments of DenseNetBC: a variant is no size."""

    growth_rate: int
    depth: int | None
    compression: float
    num_classes: int
    bn_size: int
    num_init_features: int | None
    block_config: tuple[int, ...] | None


def densenet121(num_classes: int = 1000, **options: "Unpack[NetworkOptions]") -> DenseNetBC:
    """Build DenseNet-121: blocks of 6, 12, 24 and 16 layers, k = 32, for ImageNet; 7,978,856 parameters.

    Its state dict is that of torchvision's network of this name.

    Args:
        num_classes: outputs of the classifier; at least 1.
        options: other arguments of DenseNetBC by keyword, such as in_channels, drop_rate, se_reduction, efficient and
            keep_bottleneck. small_inputs, which is False here, may be True for images such as 32x32.

    Raises:
        ValueError: an argument is out of range.
        TypeError: DenseNetBC has no such argument, or it is a size that this function sets.

    Source: Huang et al., Densely Connected Convolutional Networks, CVPR 2017, table 1.
    """
    return _imagenet((6, 12, 24, 16), 32, num_classes, options)


def densenet161(num_classes: int = 1000, **options: "Unpack[NetworkOptions]") -> DenseNetBC:
    """Build DenseNet-161: blocks of 6, 12, 36 and 24 layers, k = 48, for ImageNet; 28,681,000 parameters.

    Arguments and errors are those of densenet121. Source: torchvision's network of this name.
    """
    return _imagenet((6, 12, 36, 24), 48, num_classes, options)


def densenet169(num_classes: int = 1000, **options: "Unpack[NetworkOptions]") -> DenseNetBC:
    """Build DenseNet-169: blocks of 6, 12, 32 and 32 layers, k = 32, for ImageNet; 14,149,480 parameters.

    Arguments, errors and source are those of densenet121.
    """
    return _imagenet((6, 12, 32, 32), 32, num_classes, options)


def densenet201(num_classes: int = 1000, **options: "Unpack[NetworkOptions]") -> DenseNetBC:
    """Build DenseNet-201: blocks of 6, 12, 48 and 32 layers, k = 32, for ImageNet; 20,013,928 parameters.

    Arguments, errors and source are those of densenet121.
    """
    return _imagenet((6, 12, 48, 32), 32, num_classes, options)


def densenet264(num_classes: int = 1000, **options: "Unpack[NetworkOptions]") -> DenseNetBC:
    """Build DenseNet-264: blocks of 6, 12, 64 and 48 layers, k = 32, for ImageNet; 33,337,704 parameters.

    It is MONAI's network of this name in two dimensions; timm's densenet264d has another stem and k = 48. Arguments,
    errors and source are those of densenet121.
    """
    return _imagenet((6, 12, 64, 48), 32, num_classes, options)


def densenet_bc_100_12(num_classes: int = 100, **options: "Unpack[NetworkOptions]") -> DenseNetBC:
    """Build DenseNet-BC of depth 100 with k = 12 for CIFAR's images of 32x32; 0.8 million parameters.

    Args:
        num_classes: outputs of the classifier; at least 1.
        options: other arguments of DenseNetBC by keyword, such as in_channels, drop_rate, se_reduction, efficient and
            keep_bottleneck.

    Raises:
        ValueError: an argument is out of range.
        TypeError: DenseNetBC has no such argument, or it is a size that this function sets.

    Source: Huang et al., Densely Connected Convolutional Networks, CVPR 2017, table 2.
    """
    return DenseNetBC(growth_rate=12, depth=100, num_classes=num_classes, **options)


def densenet_bc_250_24(num_classes: int = 100, **options: "Unpack[NetworkOptions]") -> DenseNetBC:
    """Build DenseNet-BC of depth 250 with k = 24 for CIFAR's images of 32x32; 15.3 million parameters.

    Arguments, errors and source are those of densenet_bc_100_12.
    """
    return DenseNetBC(growth_rate=24, depth=250, num_classes=num_classes, **options)


def densenet_bc_190_40(num_classes: int = 100, **options: "Unpack[NetworkOptions]") -> DenseNetBC:
    """Build DenseNet-BC of depth 190 with k = 40 for CIFAR's images of 32x32; 25.6 million parameters.

    Arguments, errors and source are those of densenet_bc_100_12.
    """
    return DenseNetBC(growth_rate=40, depth=190, num_classes=num_classes, **options)


def hybrid_densenet(variant: str = "A+B+C", **options: "Unpack[HybridOptions]") -> DenseNetBC:
    """Build one of the five networks of the hybrid approach: DenseNetBC.variant(variant, **options).

    Args:
        variant: 'vanilla', 'A', 'B', 'A+B' or 'A+B+C', which DenseNetBC.variant describes.
        options: arguments of DenseNetBC by keyword, such as depth, growth_rate, num_classes and in_channels; they
            override the variant's.

    Raises:
        ValueError: there is no such variant, or an argument is out of range.
        TypeError: DenseNetBC has no such argument.

    Source: A Hybrid Approach to Image Classification on Densely Connected Convolutional Networks, section 3.6.
    """
    return DenseNetBC.variant(variant, **options)


def _imagenet(block_config: tuple[int, ...], growth_rate: int, num_classes: int, options: NetworkOptions) -> DenseNetBC:
    # All of them start with 2 * growth_rate channels, which is what num_init_features=None means.
    return DenseNetBC(
        growth_rate=growth_rate,
        block_config=block_config,
        num_classes=num_classes,
        **{"small_inputs": False, **options},
    )
