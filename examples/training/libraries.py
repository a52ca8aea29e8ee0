"""Libraries that only the examples need."""

import importlib
from types import ModuleType

from training.errors import UserError

PACKAGES = {"yaml": "pyyaml", "safetensors.torch": "safetensors", "torch.utils.tensorboard": "tensorboard"}


def library(module: str) -> ModuleType:
    """The module, one of PACKAGES.

    Raises:
        UserError: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = PACKAGES[module]
        raise UserError(f"{package} cannot be imported ({error}): pip install {package}") from error
