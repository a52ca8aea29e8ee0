"""The build, the loader and `python -m densenet_ext.info`: what they say when all is well, and when something is missing."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import densenet_ext
from densenet_ext._load import _explain, load_extension
from densenet_ext._version import __version__

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(densenet_ext.__file__).parent
SUFFIX = Path(load_extension().__file__).name.removeprefix("_C")

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="needs a C++ compiler")
needs_ninja = pytest.mark.skipif(shutil.which("ninja") is None, reason="needs ninja")


def run(*command, cwd, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


# ---- the library ------------------------------------------------------------------------------------------------------


def test_build_info():
    info = load_extension().build_info()
    assert info["version"] == __version__
    assert info["torch_target"] == "2.11"
    assert info["instruction_sets"][0] == "baseline"
    assert load_extension().cpu_capability() in info["instruction_sets"]
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert info["cuda"] == bool(info["cuda_architectures"])


def test_version_of_the_installed_distribution():
    try:
        installed = importlib.metadata.version("densenet_ext")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("built in place, not installed")
    assert installed == __version__


def test_parallel_threads_are_torchs():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert load_extension().parallel_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert load_extension().parallel_threads() == threads


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_library_names_no_directory_to_search():
    dynamic = subprocess.run(
        ["readelf", "-d", load_extension().__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "libtorch_cpu" in dynamic
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_unknown_cpu_capability_fails_the_import(tmp_path):
    command = [sys.executable, "-c", "from densenet_ext._load import load_extension; load_extension()"]
    result = run(*command, cwd=tmp_path, PYTHONPATH=str(PACKAGE.parent), DENSENET_EXT_CPU_CAPABILITY="sse9")
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError") and "DENSENET_EXT_CPU_CAPABILITY" in message and "sse9" in message


# ---- loading ----------------------------------------------------------------------------------------------------------

LOAD = """
import sys
from pathlib import Path
sys.path[:] = [entry for entry in sys.path if not (Path(entry) / "densenet_ext").is_dir()]
sys.path.insert(0, ".")
from densenet_ext import {module}
"""


@pytest.fixture
def bare_package(tmp_path):
    """A densenet_ext that can only load its library, and has none."""
    package = tmp_path / "densenet_ext"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("_load.py", "_version.py", "info.py"):
        shutil.copy(PACKAGE / name, package)
    return package


def load_in(package, before="import torch", then="load_extension()"):
    """The last line of what `load_extension()` prints there, with no other densenet_ext in sight."""
    code = before + LOAD.format(module="_load") + "_load." + then
    result = run(sys.executable, "-c", code, cwd=package.parent)
    return (result.stderr or result.stdout).splitlines()[-1]


def test_library_not_built(bare_package):
    message = load_in(bare_package)
    assert message.startswith("ImportError: densenet_ext's library is not built: run `pip install")


def test_library_of_another_python(bare_package):
    (bare_package / "_C.cpython-399-x86_64-linux-gnu.so").touch()
    message = load_in(bare_package)
    assert message.startswith("ImportError: densenet_ext was built for another Python (_C.cpython-399-")
    assert "pip install" in message


def test_damaged_library(bare_package):
    (bare_package / f"_C{SUFFIX}").write_bytes(
        b"not a library at all, but long enough for a header to be looked for" * 9
    )
    message = load_in(bare_package)
    assert message.startswith("ImportError: densenet_ext's library failed to load: ")


def test_library_of_another_version(bare_package):
    shutil.copy(load_extension().__file__, bare_package)
    (bare_package / "_version.py").write_text("__version__ = '9.9'\n")
    message = load_in(bare_package)
    expected = f"ImportError: densenet_ext 9.9 found the compiled library of version {__version__}: run `pip install"
    assert message.startswith(expected)


@pytest.mark.parametrize(
    "reason",
    [
        "/a/_C.so: undefined symbol: torch_parallel_for",
        "libstdc++.so.6: version `GLIBCXX_3.4.32' not found (required by /a/_C.so)",
        "libtorch_cpu.so: cannot open shared object file: No such file or directory",
    ],
)
def test_library_that_does_not_fit(reason):
    message = _explain(ImportError(reason))
    assert reason in message and "pip install --force-reinstall" in message


def test_torch_too_old(bare_package):
    old = bare_package.parent / "torch"
    old.mkdir()
    (old / "__init__.py").write_text("__version__ = '2.9.1+cu128'\n")
    message = load_in(bare_package, before="")
    assert message == (
        "ImportError: densenet_ext needs PyTorch 2.11 or newer, but this is 2.9.1+cu128: pip install --upgrade torch"
    )


def test_torch_missing(bare_package):
    message = load_in(bare_package, before="import sys; sys.modules['torch'] = None")
    assert message == "ImportError: densenet_ext needs PyTorch 2.11 or newer: pip install 'torch>=2.11'"


def test_sources_without_library_use_the_installed_one(bare_package):
    # as in a clone's root, where the sources come before the installed package
    installed = bare_package.parent / "installed" / "densenet_ext"
    installed.mkdir(parents=True)
    shutil.copy(load_extension().__file__, installed)
    line = load_in(bare_package, then="sys.path.append('installed'); print(_load.load_extension().__file__)")
    assert Path(line).name == f"_C{SUFFIX}" and "installed" in line


# ---- python -m densenet_ext.info --------------------------------------------------------------------------------------


def test_info(tmp_path):
    result = run(sys.executable, "-m", "densenet_ext.info", cwd=tmp_path, PYTHONPATH=str(PACKAGE.parent))
    assert result.returncode == 0, result.stderr
    rows = dict(line.split(None, 1) for line in result.stdout.splitlines() if not line.startswith("C"))
    assert rows["library"] == load_extension().__file__
    assert rows["torch"].startswith(torch.__version__)
    assert load_extension().cpu_capability() in rows["instruction"]


def test_info_without_library(bare_package):
    result = run(
        sys.executable,
        "-c",
        "import torch" + LOAD.format(module="info") + "sys.exit(info.main())",
        cwd=bare_package.parent,
    )
    assert result.returncode == 1
    assert "NOT LOADED: densenet_ext's library is not built" in result.stdout
    assert torch.__version__ in result.stdout


# ---- building ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def source_tree(tmp_path):
    """What setup.py needs, and a csrc/ with nothing in it."""
    pytest.importorskip("setuptools", minversion="77")
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs a clone")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "_build_backend", tmp_path / "_build_backend", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "densenet_ext").mkdir()
    shutil.copy(ROOT / "densenet_ext" / "_version.py", tmp_path / "densenet_ext")
    (tmp_path / "csrc" / "cpu" / "kernels").mkdir(parents=True)
    return tmp_path


def build(tree, **environment):
    return run(sys.executable, "setup.py", "-q", "build_ext", cwd=tree, **environment)


def last_error(result):
    """The message after `error: `, all its lines."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    return (
        result.stderr.rpartition("\nerror: ")[2]
        if "\nerror: " in result.stderr
        else result.stderr.removeprefix("error: ")
    )


def test_no_compiler(source_tree):
    assert last_error(build(source_tree, CXX="/nonexistent/g++")) == (
        "the C++ compiler '/nonexistent/g++' cannot be run: set CXX to the path of a C++17 compiler, or unset it\n"
    )


def test_compiler_too_old(source_tree):
    compiler = source_tree / "old"
    compiler.write_text('#!/bin/sh\ncase "$*" in *--version*) echo "g++ 4.8.5";; *) exit 1;; esac\n')
    compiler.chmod(0o755)
    assert last_error(build(source_tree, CXX=str(compiler))) == (
        "g++ 4.8.5 does not compile C++17: install g++ 9, clang 10 or newer and set CXX to it\n"
    )


@needs_compiler
def test_torch_too_old_to_build(source_tree):
    old = source_tree / "path" / "torch"
    old.mkdir(parents=True)
    (old / "__init__.py").touch()
    (old / "version.py").write_text("__version__ = '2.9.1'\ncuda = None\n")
    assert last_error(build(source_tree, PYTHONPATH=str(old.parent))) == (
        "PyTorch 2.11 or newer is needed, but this is 2.9.1: pip install --upgrade torch\n"
    )


@needs_compiler
@needs_ninja
def test_failed_compilation_names_the_file_and_the_error(source_tree):
    (source_tree / "csrc" / "cpu" / "kernels" / "broken.cpp").write_text("int f() { return missing; }\n")
    error = last_error(build(source_tree, MAX_JOBS="1"))
    assert error.startswith("compiling csrc/cpu/kernels/broken.cpp for baseline failed:\n")
    assert "missing" in error and "please report this" in error


@needs_compiler
@needs_ninja
def test_compiler_out_of_memory(source_tree):
    (source_tree / "csrc" / "a.cpp").touch()
    compiler = source_tree / "killed"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-MMD*) kill -9 $$;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    assert "MAX_JOBS=1" in last_error(build(source_tree, CXX=str(compiler)))


@needs_compiler
@needs_ninja
def test_max_jobs_must_be_a_number(source_tree):
    assert last_error(build(source_tree, MAX_JOBS="all")) == "MAX_JOBS must be a whole number, but is 'all'\n"


@needs_compiler
@needs_ninja
def test_header_rebuilds_what_includes_it_and_nothing_else(source_tree):
    kernels = source_tree / "csrc" / "cpu" / "kernels"
    header = source_tree / "csrc" / "a.h"
    header.write_text("")
    (source_tree / "csrc" / "a.cpp").write_text('#include "a.h"\n')
    (kernels / "b.cpp").touch()

    first = build(source_tree)
    assert first.returncode == 0, first.stderr
    sets = load_extension().build_info()["instruction_sets"]
    for name in sets:
        assert f"compiling csrc/cpu/kernels/b.cpp for {name}\n" in first.stdout
    assert "compiling" not in build(source_tree).stdout
    header.write_text("// changed\n")
    again = build(source_tree).stdout
    assert "compiling csrc/a.cpp\n" in again and "b.cpp" not in again


# ---- the build backend ------------------------------------------------------------------------------------------------


@pytest.fixture
def backend(monkeypatch):
    pytest.importorskip("setuptools", minversion="77")
    if not (ROOT / "_build_backend").exists():
        pytest.skip("needs a clone")
    monkeypatch.syspath_prepend(str(ROOT / "_build_backend"))
    import backend

    return backend


def test_backend_asks_for_torch_only_where_none_fits(backend, monkeypatch):
    assert backend._torch_requirement() == []
    found = backend.find_torch()
    assert found.directory == Path(torch.__file__).parent and found.version == torch.__version__

    monkeypatch.setattr(backend, "find_torch", lambda: None)
    assert backend._torch_requirement() == ["torch>=2.11"]
    old = type(found)(found.directory, "2.9.1", None)
    monkeypatch.setattr(backend, "find_torch", lambda: old)
    assert backend._torch_requirement() == ["torch>=2.11"]


def test_backend_looks_past_pips_isolation(backend, tmp_path):
    # pip's way: a sitecustomize on PYTHONPATH that takes the site directories off the path
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]"
    )
    code = f"import sys; sys.path.insert(0, {str(ROOT / '_build_backend')!r}); import target as t; "
    code += "print(t._visible_here(), t.find_torch().directory)"
    result = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path), PYTHONNOUSERSITE="1")
    if "site-packages" not in torch.__file__:
        pytest.skip("torch is not where the imitation of pip hides it")
    assert result.stdout.split() == ["None", str(Path(torch.__file__).parent)], result.stderr
