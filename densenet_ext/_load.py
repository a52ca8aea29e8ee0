"""Load the compiled libraries, or say in one sentence why that failed and what to do."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import re
import sys
import warnings
from importlib.machinery import ExtensionFileLoader, PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from densenet_ext._version import __version__

OLDEST_TORCH = "2.11"
INSTALL = "run `pip install --force-reinstall --no-deps .` in a clone of densenet_ext"


def load_extension() -> ModuleType:
    """Return the module `densenet_ext._C`; loading it registers the ops `torch.ops.densenet_ext`.

    The CUDA kernels are loaded, too, if there are any that fit; cuda_status tells if they were.

    Raises:
        ImportError: torch is missing or too old, or the library is missing, was built for another Python, or cannot be
            loaded; the message says what to do.
    """
    if "densenet_ext._C" not in sys.modules:
        _require_torch()  # importing torch also loads the libraries that ours is linked to
        _use_installed_library()
    try:
        extension = _import_library()
    except ImportError as error:
        raise ImportError(_explain(error)) from None
    built = extension.build_info()["version"]
    if built != __version__:
        raise ImportError(_other_version("library", built))
    _load_cuda(extension)
    return extension


def cuda_status() -> str | None:
    """Return None if the CUDA kernels are loaded, else why not, as in "not in this build: nvcc was not found"."""
    return _load_cuda(load_extension())


@functools.cache
def _load_cuda(extension: ModuleType) -> str | None:
    """Register the CUDA kernels. A failure here is only a warning: CPU users do not need the CUDA kernels."""
    info = extension.build_info()
    if info.get("simulated"):
        return "simulated on the CPU"
    if not info["cuda"]:
        return f"not in this build: {info['cuda_missing']}"
    import torch

    ours, theirs = _major(info["cuda_version"]), _major(torch.version.cuda)
    if ours != theirs:
        return f"built for CUDA {ours}, torch has {f'CUDA {theirs}' if theirs else 'none'}: not loaded"
    path = Path(extension.__file__).with_name(Path(extension.__file__).name.replace("_C", "_cuda", 1))
    try:
        version = ctypes.CDLL(str(path)).densenet_ext_cuda_version
        version.restype = ctypes.c_char_p
        built = version().decode()
        failure = None if built == __version__ else _other_version("CUDA kernels", built)
    except (OSError, AttributeError) as error:
        failure = f"{error}: {INSTALL}" if path.exists() else f"{path.name} is missing: {INSTALL}"
    if failure is None:
        return None
    warnings.warn(f"densenet_ext's CUDA kernels failed to load: {failure}", RuntimeWarning, stacklevel=2)
    return f"failed to load: {failure}"


def _major(version: str | None) -> str:
    return (version or "").partition(".")[0]


def _other_version(what: str, built: str) -> str:
    return f"densenet_ext {__version__} found the compiled {what} of version {built}: {INSTALL}"


def _import_library() -> ModuleType:
    """Import densenet_ext._C, or the file that DENSENET_EXT_LIBRARY names: the tests' simulated device."""
    path = os.environ.get("DENSENET_EXT_LIBRARY")
    if not path or "densenet_ext._C" in sys.modules:
        return importlib.import_module("densenet_ext._C")
    spec = spec_from_file_location("densenet_ext._C", path, loader=ExtensionFileLoader("densenet_ext._C", path))
    extension = module_from_spec(spec)
    spec.loader.exec_module(extension)
    sys.modules["densenet_ext._C"] = extension
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
    """Let the sources, which Python finds first in a clone's root, use the library of the installed package."""
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
    # The library lacks a symbol, or the C++ runtime is older than the compiler's: a build on this machine fits both.
    if re.search(r"undefined symbol|[Ss]ymbol not found|version `|cannot open shared object", str(error)):
        return f"densenet_ext's library does not fit this machine's torch or system ({error}): {INSTALL}"
    return f"densenet_ext's library failed to load: {error}"
