"""Networks of the libraries that `convert` knows, built from one set of options; those that are installed."""

from importlib.util import find_spec


def _torchvision(in_channels, growth_rate, **options):
    import torchvision

    model = torchvision.models.DenseNet(growth_rate=growth_rate, num_init_features=2 * growth_rate, **options)
    return _with_channels(model, in_channels)


def _torchxrayvision(growth_rate, **options):
    import torchxrayvision

    return torchxrayvision.models.DenseNet(growth_rate=growth_rate, num_init_features=2 * growth_rate, **options)


def _timm(in_channels, drop_rate, **options):
    import timm

    return timm.models.densenet.DenseNet(in_chans=in_channels, proj_drop_rate=drop_rate, **options)


def _monai(in_channels, num_classes, drop_rate, growth_rate, **options):
    import monai

    sizes = {"out_channels": num_classes, "dropout_prob": drop_rate, "growth_rate": growth_rate}
    return monai.networks.nets.DenseNet(2, in_channels, init_features=2 * growth_rate, **sizes, **options)


def _with_channels(model, in_channels):
    """Give a model another first convolution, as people do for images that are not colored."""
    from torch import nn

    first = model.features.conv0
    model.features.conv0 = nn.Conv2d(in_channels, first.out_channels, 7, stride=2, padding=3, bias=False)
    return model


# The options that all of them have.
SIZES = ("in_channels", "growth_rate", "block_config", "bn_size", "num_classes", "drop_rate")
_BUILDERS = {"torchvision": _torchvision, "torchxrayvision": _torchxrayvision, "timm": _timm, "monai": _monai}
LIBRARIES = {name: build for name, build in _BUILDERS.items() if find_spec(name)}
