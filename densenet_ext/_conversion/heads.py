"""Networks call ReLU, a global average pool and a classifier after their `features`: by these names in each library."""

import sys
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .. import _reasons
from .specs import child


@dataclass(frozen=True)
class HeadSpec:
    """Names of the modules after `features`.

    relu: None if forward calls torch.nn.functional.relu, 'features' if the last norm includes the ReLU; pool: None if
    forward calls adaptive_avg_pool2d and flatten; rest: modules that are called with the pooled features [N, C], one
    after the other.
    """

    relu: str | None = None
    pool: str | None = None
    rest: tuple[str, ...] = ("classifier",)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all modules."""
        return tuple(name for name in (self.relu, self.pool, *self.rest) if name is not None)

    def reason(self, network: nn.Module, prefix: str) -> str | None:
        """Return why ReLU and pool cannot belong to a fused stage, or None."""
        reason = None
        for container in dict.fromkeys(name.rpartition(".")[0] for name in self.parts if "." in name):
            names = [name.rpartition(".")[2] for name in self.parts if name.startswith(f"{container}.")]
            reason = reason or _reasons.module_reason(child(network, container), prefix, container, nn.Sequential)
            if reason is None and [*child(network, container)._modules] != names:
                reason = f"{prefix}{container} does not consist of {', '.join(names)}"
        if reason is None and self.relu not in (None, "features"):
            reason = _reasons.module_reason(child(network, self.relu), prefix, self.relu, nn.ReLU)
        if reason is None and self.pool is not None:
            reason = _pool_reason(child(network, self.pool), prefix, self.pool)
        return reason

    def pooled(self, network: nn.Module, maps: Tensor) -> Tensor:
        """Return the pooled features [N, C] of maps [N, C, H, W], by the network's own modules."""
        if self.relu != "features":
            maps = F.relu(maps) if self.relu is None else child(network, self.relu)(maps)
        return (F.adaptive_avg_pool2d(maps, 1) if self.pool is None else child(network, self.pool)(maps)).flatten(1)

    def run(self, network: nn.Module, pooled: Tensor) -> Tensor:
        """Call what comes after the pool."""
        for name in self.rest:
            pooled = child(network, name)(pooled)
        return pooled


def _pool_reason(pool: nn.Module, prefix: str, name: str) -> str | None:
    """Check that a module is a global average pool: PyTorch's, or timm's SelectAdaptivePool2d by its settings."""
    timm = sys.modules.get("timm.layers.adaptive_avgmax_pool")
    if timm is not None and type(pool) is timm.SelectAdaptivePool2d:
        if type(pool.pool) not in (nn.AdaptiveAvgPool2d, timm.FastAdaptiveAvgPool):
            return f"{prefix}{name}.pool_type is {pool.pool_type!r}, not 'avg'"
        reason = _reasons.module_reason(pool, prefix, name, type(pool))
        return reason or _reasons.module_reason(pool.pool, prefix, f"{name}.pool", type(pool.pool))
    reason = _reasons.module_reason(pool, prefix, name, nn.AdaptiveAvgPool2d)
    if reason is None and pool.output_size not in (1, (1, 1), [1, 1]):
        reason = f"{prefix}{name}.output_size is {pool.output_size}, not 1"
    return reason


# A network that has these modules is tried with the fused head, and proved by comparison, as layers are.
HEADS: dict[str, HeadSpec] = {
    "torchvision": HeadSpec(),
    "timm": HeadSpec("features", "global_pool", ("head_drop", "classifier")),
    "MONAI": HeadSpec("class_layers.relu", "class_layers.pool", ("class_layers.flatten", "class_layers.out")),
}
