"""Names of the parts of a dense layer, in the libraries that have DenseNets and in a network of one's own."""

from dataclasses import dataclass, fields

from torch import nn

ORDERS = ("new_last", "new_first")
RETURNS = ("new", "concatenation")


@dataclass(frozen=True)
class DenseLayerSpec:
    """Names of the parts of a dense layer, for densenet_ext.convert.

        y = dropout(conv2(relu(norm2(conv1(relu(norm1(x)))))))
    x is the concatenation of all earlier channels, y are the layer's new ones.

    Args:
        norm1, conv1, norm2, conv2: names of the two batch normalizations, of the 1x1 and of the 3x3 convolution; a dot
            leads into a child, as in 'layers.norm1'.
        relu1, relu2: names of the ReLU modules; None if forward calls torch.nn.functional.relu; the name of the norm
            before if that includes the ReLU, as timm's BatchNormAct2d does.
        dropout: name of the torch.nn.Dropout or Dropout2d after conv2, which a layer may lack; None: there is none.
        drop_rate: name of the attribute with the probability that forward passes to torch.nn.functional.dropout after
            conv2; None: there is none.
        order: 'new_last' or 'new_first': the place of y in the concatenation that the next layer reads.
        returns: 'new': the layer returns y, and takes a tensor or a list of tensors to concatenate; 'concatenation': it
            takes x and returns the concatenation of x and y.

    Raises:
        TypeError: a name is no string.
        ValueError: order or returns is none of these; both dropout and drop_rate are given.

    Source: Huang et al., Densely Connected Convolutional Networks, CVPR 2017, section 3 (DenseNet-B).
    """

    norm1: str = "norm1"
    conv1: str = "conv1"
    norm2: str = "norm2"
    conv2: str = "conv2"
    relu1: str | None = "relu1"
    relu2: str | None = "relu2"
    dropout: str | None = None
    drop_rate: str | None = None
    order: str = "new_last"
    returns: str = "new"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) and not (value is None and field.default in (None, "relu1", "relu2")):
                raise TypeError(f"{field.name} is {value!r}; it must be a name")
        for name, allowed in (("order", ORDERS), ("returns", RETURNS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it may be {' or '.join(map(repr, allowed))}")
        if self.dropout is not None and self.drop_rate is not None:
            raise ValueError(f"dropout is {self.dropout!r} and drop_rate is {self.drop_rate!r}; only one may be given")

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all modules in the order in which they are called; a name may stand there twice."""
        names = (self.norm1, self.relu1, self.conv1, self.norm2, self.relu2, self.conv2, self.dropout)
        return tuple(name for name in names if name is not None)


def _numbered(container: str, **options: str) -> DenseLayerSpec:
    """Return the names in a Sequential of norm, ReLU, 1x1 convolution, norm, ReLU, 3x3 convolution."""
    names = ("norm1", "relu1", "conv1", "norm2", "relu2", "conv2")
    return DenseLayerSpec(**{name: f"{container}.{i}" for i, name in enumerate(names)}, **options)


_FUNCTIONAL = {"norm1": "bn1", "norm2": "bn2", "relu1": None, "relu2": None, "returns": "concatenation"}
_SHARED = {**_FUNCTIONAL, "relu1": "relu", "relu2": "relu"}

# A layer is tried with each of these whose parts it has, and is converted with the one that computes what it computes.
LAYERS: dict[str, DenseLayerSpec] = {
    "torchvision": DenseLayerSpec(drop_rate="drop_rate"),
    "torchvision before 0.4, torchxrayvision": DenseLayerSpec(drop_rate="drop_rate", returns="concatenation"),
    "timm": DenseLayerSpec(relu1="norm1", relu2="norm2", drop_rate="drop_rate"),
    "MONAI": DenseLayerSpec(
        **{name: f"layers.{name}" for name in ("norm1", "relu1", "conv1", "norm2", "relu2", "conv2")},
        dropout="layers.dropout",
        returns="concatenation",
    ),
    "kuangliu": DenseLayerSpec(**_FUNCTIONAL, order="new_first"),
    "functional ReLU, new channels last": DenseLayerSpec(**_FUNCTIONAL),
    "bearpaw": DenseLayerSpec(**_SHARED, drop_rate="dropRate"),
    "OpenOOD": DenseLayerSpec(**_SHARED),
    "phlippe": _numbered("net", order="new_first", returns="concatenation"),
    "weiaicunzai": _numbered("bottle_neck", returns="concatenation"),
}


def child(module: nn.Module, name: str) -> nn.Module | None:
    """Return the descendant of `module` with this dotted name, or None."""
    for part in name.split("."):
        module = module._modules.get(part)
        if module is None:
            return None
    return module
