"""Random arguments of every kernel op, as a stage would have them, by their names in the op's schema.

Maps are channels last, the layer's channels being the first of a wider feature buffer.
"""

import torch

from densenet_ext._layout import arithmetic_dtype, gradient_dtype, new_features, new_maps, padded_width

EPS = 1e-5
CONSTANTS = {"eps": EPS, "training": True, "has_statistics": False, "allow_tf32": True, "dropout_scale": 1.0}
ABSENT = ("pre_mask", "post_mask", "dropout_mask", "previous_scale", "previous_shift", "previous_weight")


def bind(op, size, dtype, device):
    """A call of the op without arguments."""
    function, arguments = getattr(torch.ops.densenet_ext, op).default, new_arguments(op, size, dtype, device)
    return lambda: function(*arguments)


def new_arguments(op, size, dtype, device):
    """The arguments of one op in its order: random tensors for one size and storage type, on one device."""
    names = [argument.name for argument in getattr(torch.ops.densenet_ext, op).default._schema.arguments]
    shapes = _shapes(op, size)
    numbers = CONSTANTS | dict.fromkeys(ABSENT) | {"pixels": size.height * size.width}
    numbers["offset"] = 0 if op in ("append", "finish_gradient") else size.channels

    def new(name):
        if name in numbers:
            return numbers[name]
        if name not in shapes:
            return _new_maps(op, name, size, dtype, device)
        values = torch.randn(shapes[name], device=device, dtype=arithmetic_dtype(dtype))
        if name.endswith("weight") and values.dim() == 4:
            return values.mul_(0.1)
        return values.square_().add_(0.1) if name in ("batch_var", "m2") else values

    arguments = {name: new(name) for name in names if name != "grad_in"}
    return [arguments["grad" if name == "grad_in" else name] for name in names]


def _shapes(op, s):
    """Shapes of tensors in the type of arithmetic, by name: parameters, statistics, tables, and what belongs to samples."""
    layer = op.removesuffix("_forward").removesuffix("_backward")
    channels = s.bottleneck if layer == "conv3x3" else s.channels
    hidden = max(1, s.growth // 16)
    weight = {
        "fold_norm": (channels,),
        "bottleneck": (s.bottleneck, channels, 1, 1),
        "conv3x3": (s.growth, channels, 3, 3),
        "transition": (s.outputs, channels, 1, 1),
    }
    parameters = {
        "weight": weight.get(layer),
        "bias": (channels,),
        "norm_weight": (channels,),
        "norm_bias": (channels,),
        "fc1_weight": (hidden, s.growth),
        "fc1_bias": (hidden,),
        "fc2_weight": (s.growth, hidden),
        "fc2_bias": (s.growth,),
    }
    moments = (1, s.bottleneck) if op == "bottleneck_forward" else (s.samples, s.total)
    return {
        **parameters,
        **{f"d{name}": shape for name, shape in parameters.items()},
        **dict.fromkeys(("scale", "shift"), (1, channels)),
        **dict.fromkeys(("mean", "m2"), moments),
        **dict.fromkeys(("batch_mean", "batch_var"), (channels,)),
        **dict.fromkeys(("pooled", "gate"), (s.samples, s.growth)),
        "hidden": (s.samples, hidden),
        "coef": (3, s.samples, s.total),
        "db_affine": (3, s.bottleneck),
    }


def _new_maps(op, name, s, dtype, device):
    """A tensor with a value for each pixel, or, of the head's output, for each sample."""
    like = torch.empty(s.samples, 1, s.height, s.width, dtype=dtype, device=device)
    if name in ("bottleneck", "dv"):
        stored = gradient_dtype(like) if name == "dv" else dtype
        return torch.randn(s.rows, padded_width(s.bottleneck), dtype=dtype, device=device).to(stored)
    if name in ("features", "grad"):
        return new_features(like, s.total, gradient_dtype(like) if name == "grad" else None).normal_()
    if op.startswith("head"):
        return torch.randn(s.samples, s.channels, dtype=dtype, device=device)
    channels, size = s.channels, (s.height, s.width)
    if op.startswith("transition"):
        channels, size = s.outputs, (s.height // 2, s.width // 2)
    elif op.startswith("stem") and name in ("out", "grad_out"):
        size = ((s.height + 1) // 2, (s.width + 1) // 2)
    return new_maps(like, channels, size, channels_last=op.startswith("stem") and name in ("x", "dx")).normal_()
