"""Loads the compiled library, or says in one sentence why that failed and what to do."""

from __future__ import annotations

import importlib
import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from densenet_ext._version import __version__

OLDEST_TORCH = "2.11"
INSTALL = "run `pip install --force-reinstall --no-deps .` in a clone of densenet_ext"


def load_extension() -> ModuleType:
    """The module ``densenet_ext._C``; loading it registers the ops ``torch.ops.densenet_ext``.

    Raises ImportError, with what to do about it, where torch is missing or too old, or where the library is missing, was
    built for another Python, or cannot be loaded.
    """
    if "densenet_ext._C" not in sys.modules:
        _require_torch()  # also brings the libraries that ours is linked to into the process
        _use_installed_library()
    try:
        extension = importlib.import_module("densenet_ext._C")
    except ImportError as error:
        raise ImportError(_explain(error)) from None
    built = extension.build_info()["version"]
    if built != __version__:
        raise ImportError(f"densenet_ext {__version__} found the compiled library of version {built}: {INSTALL}")
    return extension


def _require_torch() -> None:
    needed = f"densenet_ext needs PyTorch {OLDEST_TORCH} or newer"
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(f"{needed}: pip install 'torch>={OLDEST_TORCH}'") from None
    if _release(torch.__version__) < _release(OLDEST_TORCH):
        raise ImportError(f"{needed}, but this is {torch.__version__}: pip install --upgrade torch")


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _use_installed_library() -> None:
    """In a clone's root, Python finds the sources before the installed package: take the library from the latter."""
    package = sys.modules["densenet_ext"]
    if PathFinder.find_spec("densenet_ext._C", package.__path__) is None:
        elsewhere = [str(Path(entry, "densenet_ext")) for entry in sys.path]
        spec = PathFinder.find_spec("densenet_ext._C", elsewhere)
        if spec is not None:
            package.__path__.append(str(Path(spec.origin).parent))


def _explain(error: ImportError) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "densenet_ext._C":
        others = [path.name for folder in sys.modules["densenet_ext"].__path__ for path in Path(folder).glob("_C.*.so")]
        if others:
            this = sys.implementation.cache_tag
            return f"densenet_ext was built for another Python ({others[0]}), and this is {this}: {INSTALL}"
        return f"densenet_ext's library is not built: {INSTALL}"
    # A library that lacks a symbol, or a C++ runtime older than the compiler's: a build on this machine fits both.
    if re.search(r"undefined symbol|[Ss]ymbol not found|version `|cannot open shared object", str(error)):
        return f"densenet_ext's library does not fit this machine's torch or system ({error}): {INSTALL}"
    return f"densenet_ext's library failed to load: {error}"
