"""A report says what a conversion did, as a table."""

from dataclasses import dataclass, field

from torch import nn

from ..layers import EfficientDenseBlock, EfficientDenseLayer
from .classes import is_converted
from .recognition import Finder
from .settings import BlockSettings, FeaturesSettings, LayerSettings, NetworkSettings


@dataclass
class ConversionReport:
    """A list of what `convert` or `revert` did to a model; printed, it is a table.

    Attributes:
        fused: the name of each part of the model that was changed, and what it is now.
        left_alone: the name of each part that looks like one of a DenseNet and was not changed, and why.
        difference: the largest difference between the outputs on `example` in float64, relative to the largest output;
            None without `example`.
    """

    fused: dict[str, str] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    difference: float | None = None

    def __str__(self) -> str:
        rows = [*_together(self.fused), *((name, f"left alone: {why}") for name, why in _together(self.left_alone))]
        if not rows:
            return "no dense block was found"
        width = max(len(name) for name, _ in rows)
        lines = [f"{name or '(model)':{width}}  {what}" for name, what in rows]
        if self.difference is not None:
            lines.append(f"on the example the outputs differ by {self.difference:.1e} of the largest one, in float64")
        return "\n".join(lines)


def _together(rows: dict[str, str]) -> list[tuple[str, str]]:
    """Return the rows with one line for all children of a module of which the same is said: 'features.denseblock1.*'."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, what in rows.items():
        groups.setdefault((name.rpartition(".")[0], what), []).append(name)
    return [
        (names[0] if len(names) == 1 or not parent else f"{parent}.* ({len(names)} modules)", what)
        for (parent, what), names in groups.items()
        for names in ([names] if parent else [[name] for name in names])
    ]


def report_on(model: nn.Module, finder: Finder) -> ConversionReport:
    """Return a report of what the finder found: each block, each layer without a block, and what is left alone."""
    report, inside = ConversionReport(), set()
    consumers, heads = _consumers(finder)
    for module, path in finder.paths.items():
        settings = finder.found.get(module)
        if isinstance(settings, BlockSettings):
            layers = module.get_submodule(settings.container)._modules
            report.fused[path] = f"{len(layers)} layers as one op"
            if module in heads:
                report.fused[path] += ", with the last norm, ReLU and global average pool"
            elif module in consumers:
                report.fused[path] += f", with {consumers[module]}"
            inside.update(module.modules())
        elif isinstance(settings, LayerSettings) and module not in inside:
            report.fused[path] = "a dense layer as one op"
    for module, path in finder.paths.items():
        expected = module in finder.different or type(module) in finder.specs or _looks_dense(module, path)
        if module in finder.reasons and module not in inside and expected:
            report.left_alone[path] = finder.reasons[module]
    for name, module in model.named_modules():
        if is_converted(module, "block"):
            report.left_alone[name] = "it is converted already"
    own = [name for name, m in model.named_modules() if isinstance(m, EfficientDenseBlock | EfficientDenseLayer)]
    for name in own:
        if not any(name.startswith(f"{other}.") for other in own):
            report.left_alone[name] = "it is this package's own; set its attribute `efficient`"
    return report


def _looks_dense(module: nn.Module, path: str) -> bool:
    """Return True if somebody may expect a module to be converted: ResNets have parts of the same names."""
    return "dense" in f"{path} {type(module).__name__}".lower() or "transition" in path.lower()


def _consumers(finder: Finder) -> tuple[dict[nn.Module, str], set[nn.Module]]:
    """Return the names of the transitions that follow blocks, by block, and the blocks that end in a head."""
    consumers, heads = {}, set()
    called = {module.features for module, settings in finder.found.items() if isinstance(settings, NetworkSettings)}
    for module, settings in finder.found.items():
        if isinstance(settings, FeaturesSettings):
            children = [*module._modules.items()]
            pairs = zip(children, children[1:], strict=False)
            # An encoder of segmentation-models-pytorch calls the modules of the container one by one.
            condition = "" if module in called else ", where their container calls both"
            consumers.update({b: f"{name}{condition}" for (_, b), (name, m) in pairs if m in finder.found})
        elif isinstance(settings, NetworkSettings):
            heads.add([*module.features._modules.values()][-2])
    return consumers, heads
