"""Make the DenseNets of other libraries run fused, in place, and undo it."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ._checks import check_kept
from ._conversion import checks
from ._conversion.classes import is_converted, swap, swap_back
from ._conversion.recognition import Finder
from ._conversion.report import ConversionReport, report_on
from ._conversion.specs import DenseLayerSpec

__all__ = ["ConversionReport", "DenseLayerSpec", "convert", "revert"]


def convert(
    model: nn.Module,
    *,
    layers: Mapping[type[nn.Module], DenseLayerSpec] | None = None,
    keep_bottleneck: bool | int | str = "auto",
    example: Tensor | tuple | None = None,
) -> ConversionReport:
    """Make the dense blocks of a model run fused, in place, with what consumes them.

    The DenseNets of torchvision, timm, MONAI (2D), torchxrayvision and segmentation-models-pytorch are found, alone or
    anywhere inside `model`, and so are other classes that have the same parts and compute the same. Parameters and
    buffers stay the same objects with the same names; `model.state_dict()`, optimizers and hooks stay as they are. Only
    the class of some modules changes, to a subclass of their own. What cannot be fused is left alone. At each call a
    part with a hook, another norm and the like is computed by its own modules, as docs/support.md says.

    Each class of layers, blocks, transitions and networks is proved in a process, once for all modules in which its
    forward reads the same attributes: a copy of one module with random values is compared with its fused form in
    float64, in training and evaluation mode, with gradients and statistics.

    Args:
        model: any module; changed in place.
        layers: the parts of dense layers of your own, by their class: {MyLayer: DenseLayerSpec(norm1='bn1', ...)}.
        keep_bottleneck: True: keep the outputs of all 1x1 convolutions for backward: faster, for more memory; a number:
            those of so many last layers of each block; 'auto': what costs no memory, where a network is converted up to
            its head; False: none. `plan` predicts memory and sets it within a budget.
        example: an input, or a tuple of inputs, with which to compare copies of the whole model before and after, in
            float64, in training and evaluation mode.

    Returns:
        A ConversionReport: what is fused, what is not, and why. `print` shows it as a table.

    Raises:
        TypeError: model is no module, or layers holds something else than classes and DenseLayerSpecs.
        ValueError: the outputs on `example` differ, or keep_bottleneck is none of these; nothing was changed.

    `torch.save(model)` and pickles of a converted model need densenet_ext to load, and torch.jit.script does not serve
    it: call `revert` first. State dicts need nothing.

    Source: Pleiss et al., Memory-Efficient Implementation of DenseNets, arXiv 1707.06990, for the idea.
    """
    specs = _checked(model, layers)
    finder = Finder(model, specs, check_kept(keep_bottleneck, "keep_bottleneck", auto=True))
    report = report_on(model, finder)
    if example is not None:
        report.difference = _compare(model, finder, example)
    for module, settings in finder.found.items():
        swap(module, settings)
    return report


def revert(model: nn.Module) -> ConversionReport:
    """Undo `convert`: every module has its former class again, and computes as before it.

    Args:
        model: any module; changed in place. One without converted parts stays as it is.

    Returns:
        A ConversionReport that lists the modules that were changed back.

    Raises:
        TypeError: model is no module, or a class was changed after the conversion, as FSDP2 does; nothing was changed.
    """
    _checked(model, None)
    report = ConversionReport()
    for name, module in model.named_modules():
        if is_converted(module) and "_densenet_ext_original" not in type(module).__dict__:
            raise TypeError(f"{name or 'model'} has become a {type(module).__name__} since the conversion")
    for name, module in model.named_modules():
        if is_converted(module):
            swap_back(module)
            report.fused[name] = f"{type(module).__name__} as before"
    return report


def _checked(model: nn.Module, layers: Mapping | None) -> dict[type, DenseLayerSpec]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    if layers is None:
        return {}
    if not isinstance(layers, Mapping):
        raise TypeError(f"layers is a {type(layers).__name__}; it must map classes to DenseLayerSpecs")
    for kind, spec in layers.items():
        if not isinstance(kind, type) or not issubclass(kind, nn.Module):
            raise TypeError(f"layers has the key {kind!r}; it must be a class of modules")
        if not isinstance(spec, DenseLayerSpec):
            raise TypeError(f"layers[{kind.__name__}] is a {type(spec).__name__}; it must be a DenseLayerSpec")
    return dict(layers)


def _compare(model: nn.Module, finder: Finder, example: Tensor | tuple) -> float:
    """Compare copies of the model before and after the conversion; return the largest relative difference."""
    inputs = example if isinstance(example, tuple) else (example,)
    inputs = tuple(_double(x) for x in inputs)
    plain = copy.deepcopy(model).double()
    fused = copy.deepcopy(plain)
    twins = dict(zip(model.modules(), fused.modules(), strict=True))
    for module, settings in finder.found.items():
        swap(twins[module], settings)
    worst = 0.0
    with checks.quiet(), torch.no_grad():
        for training in (True, False):
            outputs = []
            for copied in (plain, fused):
                torch.manual_seed(checks.SEED)
                outputs.append(_tensors(copied.train(training)(*inputs)))
            for want, actual in zip(*outputs, strict=True):
                error = ((want - actual).abs().max() / want.abs().max().clamp(min=1e-30)).item()
                if not error <= 1e-6:
                    mode = "training" if training else "evaluation"
                    raise ValueError(
                        f"on `example` in {mode} mode the converted model differs by {error:.1e} of the largest output; "
                        "nothing was changed"
                    )
                worst = max(worst, error)
    return worst


def _double(x: object) -> object:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _tensors(output: object) -> list[Tensor]:
    """Return the floating-point tensors in a model's output, which may be nested."""
    leaves, _ = torch.utils._pytree.tree_flatten(output)
    return [x.double() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
