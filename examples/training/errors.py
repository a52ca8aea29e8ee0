"""Errors that the user can mend: the scripts show their message and no traceback."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

REQUIRED = ("yaml", "safetensors.torch", "torch.utils.tensorboard")  # by every training
_PACKAGES = {
    "yaml": "pyyaml",
    "safetensors": "safetensors",
    "torch.utils.tensorboard": "tensorboard",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "torchvision": "torchvision, in the release that belongs to the PyTorch installed here",
}


class UserError(Exception):
    """A mistake or a condition that the user can mend; the message says what was found and the remedy."""


@contextmanager
def explain(*kinds: type[Exception], what: str, remedy: str = "") -> Iterator[None]:
    """Turn an error of these kinds inside into the UserError 'what (reason): remedy', or 'what: reason' without a remedy."""
    try:
        yield
    except kinds as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{what} ({reason}): {remedy}" if remedy else f"{what}: {reason}") from error


def library(module: str, user: str = "this program") -> ModuleType:
    """Import a library that only the examples need.

    Raises:
        UserError: it cannot be imported; the message says what needs it (`user`) and what to install.
    """
    package = next(package for name, package in _PACKAGES.items() if module.startswith(name))
    what = f"{user} needs {package.split(',')[0]}, which cannot be imported"
    with explain(ImportError, RuntimeError, what=what, remedy=f"pip install {package}"):  # RuntimeError: torchvision's
        return importlib.import_module(module)
