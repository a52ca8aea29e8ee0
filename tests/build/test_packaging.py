"""The build, the loader and `python -m densenet_ext.info`: their messages when all is well or something is missing."""

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import densenet_ext
from densenet_ext._load import _explain, _load_cuda, cuda_status, load_extension
from densenet_ext._version import __version__

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(densenet_ext.__file__).parent
SUFFIX = Path(load_extension().__file__).name.removeprefix("_C")

cuda_kernels = Path(load_extension().__file__).with_name(f"_cuda{SUFFIX}")
needs_cuda_kernels = pytest.mark.skipif(not load_extension().build_info()["cuda"], reason="built without CUDA kernels")
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
    assert info["cuda"] == bool(info["cuda_architectures"]) == bool(info["cuda_version"]) == (not info["cuda_missing"])
    assert info["simulated"] is False


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
@pytest.mark.parametrize("which", ["_C", pytest.param("_cuda", marks=needs_cuda_kernels)])
def test_library_names_no_directory_to_search(which):
    library = cuda_kernels.with_name(f"{which}{SUFFIX}")
    dynamic = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in dynamic
    assert ("libtorch_cuda" in dynamic) == (which == "_cuda")
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    assert "libcudart" not in dynamic  # linked statically


def test_unknown_cpu_capability_fails_the_import(tmp_path):
    command = [sys.executable, "-c", "from densenet_ext._load import load_extension; load_extension()"]
    result = run(*command, cwd=tmp_path, PYTHONPATH=str(PACKAGE.parent), DENSENET_EXT_CPU_CAPABILITY="sse9")
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError") and "DENSENET_EXT_CPU_CAPABILITY" in message and "sse9" in message


# ---- loading ----------------------------------------------------------------------------------------------------------

LOAD = """
import sys
import tarfile
from pathlib import Path
sys.path[:] = [entry for entry in sys.path if not (Path(entry) / "densenet_ext").is_dir()]
sys.path.insert(0, ".")
from densenet_ext import {module}
"""


@pytest.fixture
def bare_package(tmp_path):
    """A package densenet_ext with nothing but the loader, and without a library."""
    package = tmp_path / "densenet_ext"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("_load.py", "_version.py", "info.py"):
        shutil.copy(PACKAGE / name, package)
    return package


def load_in(package, start="import torch", end="load_extension()"):
    """The last line that `load_extension()` prints in this package, with no other densenet_ext on the path."""
    code = start + LOAD.format(module="_load") + "_load." + end
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
    message = load_in(bare_package, start="")
    assert message == (
        "ImportError: densenet_ext needs PyTorch 2.11 or newer, but this is 2.9.1+cu128: pip install --upgrade torch"
    )


def test_torch_missing(bare_package):
    message = load_in(bare_package, start="import sys; sys.modules['torch'] = None")
    assert message == "ImportError: densenet_ext needs PyTorch 2.11 or newer: pip install 'torch>=2.11'"


def test_sources_without_library_use_the_installed_one(bare_package):
    # in a clone's root the sources come before the installed package
    installed = bare_package.parent / "installed" / "densenet_ext"
    installed.mkdir(parents=True)
    for library in Path(load_extension().__file__).parent.glob(f"_*{SUFFIX}"):
        shutil.copy(library, installed)
    line = load_in(bare_package, end="sys.path.append('installed'); print(_load.load_extension().__file__)")
    assert Path(line).name == f"_C{SUFFIX}" and "installed" in line


# ---- loading the CUDA kernels -----------------------------------------------------------------------------------------


def load_cuda(directory, library=None, **facts):
    """cuda_status() of a library whose build_info has these facts, with this file as its CUDA kernels."""
    if library is not None:
        (directory / f"_cuda{SUFFIX}").write_bytes(library)
    facts = {"cuda": True, "cuda_version": torch.version.cuda or "13.0", "cuda_missing": "", **facts}
    extension = SimpleNamespace(__file__=str(directory / f"_C{SUFFIX}"), build_info=lambda: facts)
    return _load_cuda.__wrapped__(extension)


@needs_cuda_kernels
def test_cuda_kernels_are_registered_where_torch_can_load_them():
    if torch.version.cuda is None:
        assert (
            cuda_status()
            == f"built for CUDA {load_extension().build_info()['cuda_version'][:2]}, torch has none: not loaded"
        )
        return
    assert cuda_status() is None
    assert torch._C._dispatch_has_kernel_for_dispatch_key("densenet_ext::bottleneck_forward", "CUDA")


def test_no_cuda_kernels_in_this_build(tmp_path):
    status = load_cuda(tmp_path, cuda=False, cuda_missing="nvcc was not found")
    assert status == "not in this build: nvcc was not found"


@pytest.mark.parametrize(
    "theirs, said", [("12.8", "torch has CUDA 12"), ("130.1", "torch has CUDA 130"), (None, "torch has none")]
)
def test_cuda_kernels_for_another_cuda(tmp_path, monkeypatch, theirs, said):
    monkeypatch.setattr(torch.version, "cuda", theirs)
    assert load_cuda(tmp_path, cuda_version="13.0") == f"built for CUDA 13, {said}: not loaded"


@pytest.fixture
def torch_with_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", torch.version.cuda or "13.0")


def test_cuda_kernels_missing(tmp_path, torch_with_cuda):
    with pytest.warns(RuntimeWarning, match="CUDA kernels failed to load"):
        status = load_cuda(tmp_path)
    assert status.startswith(f"failed to load: _cuda{SUFFIX} is missing: run `pip install")


def test_cuda_kernels_damaged(tmp_path, torch_with_cuda):
    with pytest.warns(RuntimeWarning, match="CUDA kernels failed to load"):
        status = load_cuda(tmp_path, library=b"no library")
    assert status.startswith("failed to load: ") and "pip install" in status


@needs_compiler
def test_cuda_kernels_of_another_version(tmp_path, torch_with_cuda):
    source, library = tmp_path / "a.cpp", tmp_path / "a.so"
    source.write_text('extern "C" const char* densenet_ext_cuda_version() { return "9.9"; }\n')
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    with pytest.warns(RuntimeWarning, match="of version 9.9: run `pip install"):
        status = load_cuda(tmp_path, library=library.read_bytes())
    assert f"densenet_ext {__version__} found the compiled CUDA kernels of version 9.9" in status


def test_simulated_device_has_no_cuda_kernels(tmp_path):
    assert load_cuda(tmp_path, simulated=True) == "simulated on the CPU"


# ---- python -m densenet_ext.info --------------------------------------------------------------------------------------


def test_info(tmp_path):
    result = run(sys.executable, "-m", "densenet_ext.info", cwd=tmp_path, PYTHONPATH=str(PACKAGE.parent))
    assert result.returncode == 0, result.stderr
    rows = dict(line.split(None, 1) for line in result.stdout.splitlines() if not line.startswith("C"))
    assert rows["library"] == load_extension().__file__
    assert rows["torch"].startswith(torch.__version__)
    assert load_extension().cpu_capability() in rows["instruction"]


def test_info_says_which_cuda_kernels_there_are():
    row = importlib.import_module("densenet_ext.info").collect()["CUDA kernels"]
    info = load_extension().build_info()
    assert row == cuda_status() or row == f"{', '.join(info['cuda_architectures'])} (CUDA {info['cuda_version']})"


@pytest.mark.parametrize(
    "architectures, capability, translated",
    [
        (("8.0", "9.0+PTX"), (12, 0), True),
        (("8.0", "9.0+PTX"), (10, 3), True),
        (("8.0", "9.0+PTX"), (8, 9), False),
        (("8.0", "9.0+PTX"), (9, 0), False),
        (("8.0", "12.0"), (12, 1), False),
        (("8.0+PTX", "12.0"), (9, 0), True),
        (("12.0+PTX",), (9, 0), False),  # no kernel runs on it, and an error says so
        ((), (12, 0), False),  # no kernels
    ],
)
def test_info_says_where_kernels_are_translated(monkeypatch, architectures, capability, translated):
    info = importlib.import_module("densenet_ext.info")
    major, minor = capability
    device = SimpleNamespace(name="GPU", major=major, minor=minor, total_memory=1 << 35)
    built = load_extension().build_info() | {"cuda_architectures": architectures, "cuda_version": "13.0"}
    monkeypatch.setattr(load_extension(), "build_info", lambda: built)
    monkeypatch.setattr(info, "cuda_status", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    row = info.collect()["cuda:0"]
    assert row.startswith(f"GPU, compute capability {major}.{minor}, 32 GiB")
    assert (f"TORCH_CUDA_ARCH_LIST={major}.{minor} spares it" in row) == translated == ("first used" in row)


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
    """A folder with all that setup.py needs, and an empty csrc/."""
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
    """All lines of the message after `error: `."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    return (
        result.stderr.rpartition("\nerror: ")[2]
        if "\nerror: " in result.stderr
        else result.stderr.removeprefix("error: ")
    )


SOURCES = """
import runpy, setuptools
setuptools.setup = lambda **_: None
build = runpy.run_path("setup.py")
print(*build["cpp_sources"](), *build["cpu_kernels"](), *build["find_sources"](build["AMX_KERNELS"]), *sum(build["cuda_sources"](), []))
"""


def test_every_source_is_compiled_and_nothing_of_the_simulated_device():
    if not (ROOT / "csrc").exists():
        pytest.skip("needs a clone")
    result = run(sys.executable, "-c", SOURCES, cwd=ROOT)
    compiled = result.stdout.split()
    sources = {path.relative_to(ROOT) for suffix in ("cpp", "cu") for path in ROOT.glob(f"csrc/**/*.{suffix}")}
    assert sorted(compiled) == sorted(str(path) for path in sources if path.parts[1] != "simt"), result.stderr


def test_wheel_and_sdist_have_the_marker_of_type_annotations(source_tree):
    (source_tree / "densenet_ext" / "__init__.py").touch()
    shutil.copy(PACKAGE / "py.typed", source_tree / "densenet_ext")
    result = run(sys.executable, "setup.py", "-q", "build_py", "--build-lib", "lib", "sdist", cwd=source_tree)
    assert (source_tree / "lib" / "densenet_ext" / "py.typed").exists(), result.stderr
    (sdist,) = (source_tree / "dist").iterdir()
    with tarfile.open(sdist) as archive:
        assert f"{sdist.name.removesuffix('.tar.gz')}/densenet_ext/py.typed" in archive.getnames()


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
    for name in set(sets) - {"amx"}:  # it has its own files
        assert f"compiling csrc/cpu/kernels/b.cpp for {name}\n" in first.stdout
    assert "compiling" not in build(source_tree).stdout
    header.write_text("// changed\n")
    second = build(source_tree).stdout
    assert "compiling csrc/a.cpp\n" in second and "b.cpp" not in second


@needs_compiler
def test_build_without_ninja(source_tree):
    hidden, tools = source_tree / "hidden", source_tree / "tools"
    hidden.mkdir(), tools.mkdir()
    (hidden / "ninja.py").write_text("raise ImportError\n")
    for name in ("g++", "c++", "as", "ld", "collect2"):
        if path := shutil.which(name):
            (tools / name).symlink_to(path)
    environment = {"PYTHONPATH": str(hidden), "PATH": str(tools)}
    header = source_tree / "csrc" / "a.h"
    header.write_text("")
    (source_tree / "csrc" / "a.cpp").write_text('#include "a.h"\n')
    (source_tree / "csrc" / "b.cpp").touch()

    first = build(source_tree, **environment)
    assert first.returncode == 0, first.stderr
    assert "pip install ninja" in first.stdout
    assert "compiling csrc/a.cpp\n" in first.stdout and f"linking _C{SUFFIX}\n" in first.stdout
    second = build(source_tree, **environment).stdout
    assert "compiling" not in second and "linking" not in second
    header.write_text("int f() { return missing; }\n")
    error = last_error(build(source_tree, **environment))
    assert error.startswith("compiling csrc/a.cpp failed:\n") and "missing" in error
    header.write_text("int f();\n")
    second = build(source_tree, **environment).stdout
    assert "compiling csrc/a.cpp\n" in second and "linking" in second and "b.cpp" not in second


# ---- building the CUDA kernels ----------------------------------------------------------------------------------------


@pytest.fixture
def build_module(monkeypatch):
    """Imports a module of the build backend."""
    if not (ROOT / "_build_backend").exists():
        pytest.skip("needs a clone")
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


@pytest.mark.parametrize(
    "text, expected",
    [
        ("8.0;8.6;9.0+PTX", ("8.0", "8.6", "9.0+PTX")),  # torch's form: these and no others
        ("9.0 8.0", ("8.0", "9.0")),  # spaces, any order
        ("9.0+PTX;9.0", ("9.0+PTX",)),  # each once
        ("Hopper; 8.0", ("8.0", "9.0+PTX")),  # torch's names
        ("9.0a 12.0f+PTX", ("9.0", "12.0+PTX")),  # suffixes
        ("native", ("8.0", "9.0+PTX")),  # the default
    ],
)
def test_architectures(nvcc, text, expected):
    assert nvcc.parse_architectures(text) == expected


def test_architecture_flags(nvcc):
    assert nvcc.architecture_flags(("8.0", "12.0+PTX")) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


SERVED = """
#include "csrc/cuda/architectures.h"
int main(int, char** arguments) {
  for (++arguments; *arguments; arguments += 2) {
    char sign;
    const auto device = densenet_ext::cuda::capability_of(arguments[1], &sign);
    std::puts(densenet_ext::cuda::served(arguments[0], device, {8, 0}) ? "yes" : "no");
  }
}
"""


@needs_compiler
def test_devices_that_a_build_serves(tmp_path):
    if not (ROOT / "csrc").exists():
        pytest.skip("needs a clone")
    served = {
        "8.0:9.0+PTX": {
            **dict.fromkeys(["8.0", "8.6", "8.9", "9.0"], "yes"),  # binaries of their major versions
            "8.7": "no",  # Jetson Orin runs no binary of another
            **dict.fromkeys(["10.0", "10.3", "12.0", "12.1"], "yes"),  # by PTX
            "7.5": "no",
        },
        "8.0": {"8.9": "yes", "9.0": "no", "12.0": "no"},
        "8.6": {"8.0": "no", "8.6": "yes", "8.9": "yes", "8.7": "no"},
        "8.7": {"8.7": "yes", "8.9": "no"},
        "8.0+PTX": {"8.7": "yes", "8.9": "yes", "9.0": "yes"},
        "10.0:12.0": {"10.3": "yes", "11.0": "no", "12.1": "yes", "9.0": "no"},
        "7.5+PTX:9.0": {"8.0": "no", "9.0": "yes"},  # PTX older than the kernels need
    }
    pairs = [(build, device) for build, devices in served.items() for device in devices]
    source, program = tmp_path / "served.cpp", tmp_path / "served"
    source.write_text(SERVED)
    command = ["c++", "-std=c++17", "-Wall", "-Werror", f"-I{ROOT}", str(source)]
    subprocess.run([*command, "-o", str(program)], check=True, timeout=120)
    said = run(str(program), *sum(pairs, ()), cwd=tmp_path).stdout.split()
    assert dict(zip(pairs, said, strict=True)) == {(b, d): served[b][d] for b, d in pairs}


@pytest.mark.parametrize("text, named", [("7.5;8.0", "has 7.5, and"), ("sm_80", "'sm_80'"), ("8.0+ptx", "'8.0+ptx'")])
def test_architectures_that_cannot_be(nvcc, native_error, text, named):
    with pytest.raises(native_error, match="TORCH_CUDA_ARCH_LIST has ") as error:
        nvcc.parse_architectures(text)
    assert named in str(error.value)


@pytest.fixture
def fake(nvcc, monkeypatch, tmp_path):
    """make(version, probe) makes a false nvcc that answers the build; use(*commands) lets the build find these."""

    def make(version, probe="exit 0", runtime=True):
        directory = tmp_path / version
        directory.mkdir()
        if runtime:
            (directory / "libcudart_static.a").touch()
        script = directory / "nvcc"
        script.write_text(
            '#!/bin/sh\ncase "$*" in\n'
            f'*--version*) echo "Cuda compilation tools, release {version}, V{version}.88";;\n'
            f"*-E) {probe};;\n"
            f'*-dryrun) echo \'#$ LIBRARIES=  "-L{directory}/stubs" "-L{directory}"\' >&2;;\nesac\n'
        )
        script.chmod(0o755)
        return (str(script),)

    def use(*commands):
        monkeypatch.setattr(nvcc, "_compilers", lambda: list(commands))

    return SimpleNamespace(make=make, use=use)


def torch_of(nvcc, version):
    return nvcc.Torch(Path("/torch"), "2.11.0", version)


def test_nvcc_that_fits_torch(nvcc, fake, tmp_path, monkeypatch):
    fake.use(fake.make("12.9"), fake.make("13.2"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    toolkit = nvcc.find_cuda(torch_of(nvcc, "13.0"))  # the first of the same major version
    assert toolkit.version == "13.2" and toolkit.architectures == ("9.0",)
    assert f"-L{tmp_path / '13.2'}" in toolkit.libraries and "-lcudart_static" in toolkit.libraries
    assert nvcc.find_cuda(torch_of(nvcc, "12.6")).version == "12.9"


def test_no_cuda_kernels_without_nvcc(nvcc, fake):
    fake.use(("/nonexistent/nvcc",))
    assert nvcc.find_cuda(torch_of(nvcc, "13.0")).reason == "nvcc was not found"


def test_no_cuda_kernels_for_a_torch_without_cuda(nvcc, fake):
    fake.use(fake.make("13.0"))
    assert nvcc.find_cuda(torch_of(nvcc, None)).reason == "torch 2.11.0 is built without CUDA"


def test_no_cuda_kernels_from_nvcc_of_another_version(nvcc, fake):
    fake.use(fake.make("12.9"))
    assert nvcc.find_cuda(torch_of(nvcc, "13.0")).reason.endswith("nvcc is of CUDA 12.9, and torch of CUDA 13.0")


def test_no_cuda_kernels_from_nvcc_that_refuses_the_system(nvcc, fake):
    fake.use(fake.make("13.0", probe="echo 'host_config.h: error: unsupported GNU version' >&2; exit 1"))
    assert "cannot compile here (host_config.h: error: unsupported GNU" in nvcc.find_cuda(torch_of(nvcc, "13.0")).reason


def test_no_cuda_kernels_without_the_static_runtime(nvcc, fake):
    fake.use(fake.make("13.0", runtime=False))
    assert nvcc.find_cuda(torch_of(nvcc, "13.0")).reason.endswith("has no libcudart_static.a")


def test_cuda_forced(nvcc, fake, native_error, monkeypatch):
    monkeypatch.setenv("DENSENET_EXT_CUDA", "1")
    fake.use(fake.make("13.0"))
    assert nvcc.find_cuda(torch_of(nvcc, "13.2")).version == "13.0"
    with pytest.raises(native_error, match="torch 2.11.0 is built without CUDA: install one with CUDA"):
        nvcc.find_cuda(torch_of(nvcc, None))
    fake.use()
    with pytest.raises(native_error, match="nvcc was not found: install the toolkit of CUDA 13, .* set CUDA_HOME"):
        nvcc.find_cuda(torch_of(nvcc, "13.2"))
    with pytest.raises(native_error, match="a build with sanitizers: unset DENSENET_EXT_SANITIZE"):
        nvcc.find_cuda(torch_of(nvcc, "13.2"), sanitized=True)


def test_cuda_must_be_forced_or_not(nvcc, native_error, monkeypatch):
    monkeypatch.setenv("DENSENET_EXT_CUDA", "yes")
    with pytest.raises(native_error, match="DENSENET_EXT_CUDA must be 0, 1 or unset, but is 'yes'"):
        nvcc.find_cuda(torch_of(nvcc, "13.0"))


@needs_compiler
@needs_ninja
def test_build_for_the_cpu_alone(source_tree):
    kernels = source_tree / "csrc" / "cuda" / "kernels"
    kernels.mkdir(parents=True)
    for broken in (kernels / "a.cu", kernels.parent / "a.cpp"):
        broken.write_text("#error must not be compiled\n")
    result = build(source_tree, DENSENET_EXT_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert "CUDA kernels: none, switched off by DENSENET_EXT_CUDA=0\n" in result.stdout
    built = [path.name for path in source_tree.glob("build/lib*/densenet_ext/*.so")]
    assert built == [f"_C{SUFFIX}"]


PTXAS_REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN12densenet_ext4cuda6spillyIfLi48EEEvPT_' for 'sm_80'
ptxas info    : Function properties for _ZN12densenet_ext4cuda6spillyIfLi48EEEvPT_
    2248 bytes stack frame, 5728 bytes spill stores, 6312 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 2248 bytes cumulative stack size, 360 bytes cmem[0]
ptxas info    : Compile time = 467.362 ms
ptxas info    : Compiling entry function '_ZN12densenet_ext4cuda4fineEPf' for 'sm_90'
ptxas info    : Function properties for _ZN12densenet_ext4cuda4fineEPf
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 1 barriers, 128 bytes smem
"""


def test_registers_of_kernels(build_module, tmp_path):
    ptxas = build_module("ptxas")
    spilly, fine = ptxas.parse(PTXAS_REPORT)
    assert (spilly.architecture, spilly.registers, spilly.shared, spilly.stack) == ("sm_80", 32, 0, 2248)
    assert (spilly.spill_stores, spilly.spill_loads) == (5728, 6312)
    assert (fine.architecture, fine.registers, fine.shared, fine.stack) == ("sm_90", 10, 128, 8)
    assert spilly.spills and not fine.spills

    (tmp_path / "a.cu.ptxas").write_text(PTXAS_REPORT)
    lines = ptxas.table([tmp_path / "a.cu.ptxas"]).splitlines()
    assert lines[0].split() == ["source", "kernel", "architecture", "registers", "shared", "stack", "spilled"]
    assert lines[1].split()[2:] == ["sm_90", "10", "128", "8", "0"]
    assert lines[2].split()[-5:] == ["sm_80", "32", "0", "2248", "12040"]


@pytest.mark.parametrize("allowed", [False, True])
def test_spilled_registers_fail_the_build(build_module, tmp_path, monkeypatch, capsys, allowed):
    ptxas = build_module("ptxas")
    monkeypatch.setenv("DENSENET_EXT_ALLOW_SPILLS", str(int(allowed)))
    log, output = tmp_path / "a.cu.ptxas", tmp_path / "a.o"
    output.touch()
    code = f"print({PTXAS_REPORT!r}, 'a.cu(1): warning: something else', sep='')"
    status = ptxas.main(str(log), sys.executable, "-c", code, "-o", str(output))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "a.cu(1): warning: something else"  # without the lines of the report
    assert printed[1].startswith("warning: " if allowed else "error: ") and "spilly" in printed[1]
    assert printed[1].endswith(" for sm_80 spills registers: 5728 bytes stored, 6312 bytes loaded")
    assert len(printed) == 2 and status == int(not allowed)
    assert output.exists() == log.exists() == allowed


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
    # pip isolates in this way: a sitecustomize on PYTHONPATH takes the site directories off the path.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]"
    )
    code = f"import sys; sys.path.insert(0, {str(ROOT / '_build_backend')!r}); import target as t; "
    code += "print(t._visible_here(), t.find_torch().directory)"
    result = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path), PYTHONNOUSERSITE="1")
    if "site-packages" not in torch.__file__:
        pytest.skip("torch is not where the imitation of pip hides it")
    assert result.stdout.split() == ["None", str(Path(torch.__file__).parent)], result.stderr
