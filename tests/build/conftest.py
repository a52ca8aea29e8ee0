"""A package without its library, a folder in which to build, and the modules of the build backend."""

import importlib
import shutil

import pytest
from installed import PACKAGE, ROOT


@pytest.fixture
def bare_package(tmp_path):
    """A densenet_ext that can only load its library, and has none."""
    package = tmp_path / "densenet_ext"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("_load.py", "_version.py", "info.py"):
        shutil.copy(PACKAGE / name, package)
    return package


@pytest.fixture
def source_tree(tmp_path):
    """A folder with all that setup.py needs, and a csrc/ with nothing in it."""
    pytest.importorskip("setuptools", minversion="77")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "_build_backend", tmp_path / "_build_backend", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "densenet_ext").mkdir()
    shutil.copy(ROOT / "densenet_ext" / "_version.py", tmp_path / "densenet_ext")
    (tmp_path / "csrc" / "cpu" / "kernels").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def build_module(monkeypatch):
    """Imports a module of the build backend."""
    pytest.importorskip("setuptools", minversion="77")
    monkeypatch.syspath_prepend(str(ROOT / "_build_backend"))
    return importlib.import_module


@pytest.fixture
def nvcc(build_module, monkeypatch):
    for name in ("CXX", "CUDA_HOME", "CUDACXX", "TORCH_CUDA_ARCH_LIST", "DENSENET_EXT_CUDA"):
        monkeypatch.delenv(name, raising=False)
    return build_module("nvcc")


@pytest.fixture
def native_error(build_module):
    return build_module("native").NativeBuildError
