"""Fused dense stages for PyTorch, which train DenseNets in a fraction of the memory."""

from ._version import __version__

__all__ = [
    "ConversionReport",
    "DenseLayerSpec",
    "DenseNetBC",
    "DropChannel",
    "EfficientDenseBlock",
    "EfficientDenseLayer",
    "Plan",
    "SqueezeExcitation",
    "Transition",
    "__version__",
    "convert",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet_bc_100_12",
    "densenet_bc_190_40",
    "densenet_bc_250_24",
    "functional",
    "hybrid_densenet",
    "largest_batch",
    "load_weights",
    "memory",
    "plan",
    "release_workspaces",
    "revert",
    "set_fallback",
    "set_workspace_limit",
    "workspace_use",
]

try:
    from . import functional, memory
    from .conversion import ConversionReport, DenseLayerSpec, convert, revert
    from .factories import (
        densenet121,
        densenet161,
        densenet169,
        densenet201,
        densenet264,
        densenet_bc_100_12,
        densenet_bc_190_40,
        densenet_bc_250_24,
        hybrid_densenet,
    )
    from .fallback import set_fallback
    from .layers import DropChannel, EfficientDenseBlock, EfficientDenseLayer, SqueezeExcitation, Transition
    from .memory import release_workspaces, set_workspace_limit, workspace_use
    from .models import DenseNetBC
    from .planning import Plan, largest_batch, plan
    from .weights import load_weights
except ImportError as error:
    # The error is raised when a name is used, so that `python -m densenet_ext info` can still say what is wrong.
    _error = error

    def __getattr__(name: str) -> object:
        if name in __all__:
            raise ImportError(str(_error)) from _error
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
