"""Loading the library and the CUDA kernels: what is said where something is missing or does not fit."""

import shutil
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from installed import ALONE, EXTENSION, LIBRARY, SUFFIX, needs_compiler, needs_cuda_kernels, run_python, write

from densenet_ext._load import _explain, _load_cuda, cuda_status
from densenet_ext._version import __version__


def load_in(package, start="import torch", end="_load.load_extension()"):
    """The last line of what `load_extension()` prints there, with no other densenet_ext in sight."""
    result = run_python("-c", start + ALONE + "from densenet_ext import _load; " + end, cwd=package.parent)
    return (result.stderr or result.stdout).splitlines()[-1]


# the files besides the package; how Python starts; the error
FAILURES = {
    "not built": ({}, "import torch", "densenet_ext's library is not built: run `pip install*"),
    "of another Python": (
        {"densenet_ext/_C.cpython-399-x86_64-linux-gnu.so": ""},
        "import torch",
        "densenet_ext was built for another Python (_C.cpython-399-*pip install*",
    ),
    "damaged": (
        {f"densenet_ext/_C{SUFFIX}": "not a library at all, but long enough for a header to be looked for" * 9},
        "import torch",
        "densenet_ext's library failed to load: *",
    ),
    "torch too old": (
        {"torch/__init__.py": "__version__ = '2.9.1+cu128'\n"},
        "",
        "densenet_ext needs PyTorch 2.11 or newer, but this is 2.9.1+cu128: pip install --upgrade torch",
    ),
    "torch missing": (
        {},
        "import sys; sys.modules['torch'] = None",
        "densenet_ext needs PyTorch 2.11 or newer: pip install 'torch>=2.11'",
    ),
}


@pytest.mark.parametrize(("files", "start", "message"), FAILURES.values(), ids=FAILURES)
def test_library_that_cannot_be_loaded(bare_package, files, start, message):
    write(bare_package.parent, files)
    found = load_in(bare_package, start)
    assert fnmatchcase(found, f"ImportError: {message}"), found


def test_library_of_another_version(bare_package):
    shutil.copy(LIBRARY, bare_package)
    write(bare_package, {"_version.py": "__version__ = '9.9'\n"})
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


def test_sources_without_library_use_the_installed_one(bare_package):
    # in a clone's root the sources come before the installed package
    installed = bare_package.parent / "installed" / "densenet_ext"
    installed.mkdir(parents=True)
    for library in LIBRARY.parent.glob(f"_*{SUFFIX}"):
        shutil.copy(library, installed)
    line = load_in(bare_package, end="sys.path.append('installed'); print(_load.load_extension().__file__)")
    assert Path(line).name == f"_C{SUFFIX}" and "installed" in line


@needs_cuda_kernels
def test_cuda_kernels_are_registered_where_torch_can_load_them():
    if torch.version.cuda is None:
        built = EXTENSION.build_info()["cuda_version"][:2]
        assert cuda_status() == f"built for CUDA {built}, torch has none: not loaded"
        return
    assert cuda_status() is None
    assert torch._C._dispatch_has_kernel_for_dispatch_key("densenet_ext::bottleneck_forward", "CUDA")


@pytest.fixture
def load_cuda(tmp_path, monkeypatch):
    """cuda_status() of a library that was built with these facts and has this file for its CUDA kernels."""

    def load(library=None, torch_cuda="13.0", **facts):
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        if library is not None:
            (tmp_path / f"_cuda{SUFFIX}").write_bytes(library)
        facts = {"cuda": True, "cuda_version": "13.0", "cuda_missing": "", **facts}
        return _load_cuda.__wrapped__(SimpleNamespace(__file__=str(tmp_path / f"_C{SUFFIX}"), build_info=lambda: facts))

    return load


@pytest.mark.parametrize(
    ("facts", "status"),
    [
        ({"cuda": False, "cuda_missing": "nvcc was not found"}, "not in this build: nvcc was not found"),
        ({"torch_cuda": "12.8"}, "built for CUDA 13, torch has CUDA 12: not loaded"),
        ({"torch_cuda": "130.1"}, "built for CUDA 13, torch has CUDA 130: not loaded"),
        ({"torch_cuda": None}, "built for CUDA 13, torch has none: not loaded"),
        ({"simulated": True}, "simulated on the CPU"),
    ],
)
def test_cuda_kernels_that_are_not_wanted(load_cuda, facts, status):
    assert load_cuda(**facts) == status


@pytest.mark.parametrize(
    ("library", "status"),
    [
        (None, f"failed to load: _cuda{SUFFIX} is missing: run `pip install*"),
        (b"no library", "failed to load: *pip install*"),
    ],
    ids=["missing", "damaged"],
)
def test_cuda_kernels_that_cannot_be_loaded(load_cuda, library, status):
    with pytest.warns(RuntimeWarning, match="CUDA kernels failed to load"):
        assert fnmatchcase(load_cuda(library), status)


@needs_compiler
def test_cuda_kernels_of_another_version(tmp_path, load_cuda):
    source, library = tmp_path / "a.cpp", tmp_path / "a.so"
    source.write_text('extern "C" const char* densenet_ext_cuda_version() { return "9.9"; }\n')
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    with pytest.warns(RuntimeWarning, match="of version 9.9: run `pip install"):
        status = load_cuda(library.read_bytes())
    assert f"densenet_ext {__version__} found the compiled CUDA kernels of version 9.9" in status
