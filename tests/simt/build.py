"""Builds the library that runs the CUDA kernels on a simulated device; prints its path.

--sanitize: compile the kernels with AddressSanitizer and UndefinedBehaviorSanitizer, without the simulator's checks.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "_build_backend"))

import native  # noqa: E402
from target import OLDEST_TORCH, find_torch  # noqa: E402

FLAGS = [
    "-std=c++17",
    "-O2",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-fno-strict-aliasing",
    "-DDENSENET_EXT_SIMT",
    "-Icsrc",
]
# Every load and store of a kernel calls the simulator, by the hooks of ThreadSanitizer but without its runtime.
CUDA_FLAGS = ["-x", "c++", "-Wno-unused-variable"]  # used in an unroll pragma only
KERNEL_FLAGS = [*CUDA_FLAGS, "-fsanitize=thread"]
SANITIZERS = "address,undefined"
SANITIZE_FLAGS = ["-O1", f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
STUBS = "stubs.cpp"
BUILDS = Path("build/simt")
SIMULATOR = Path("csrc/simt")
CHECKS = Path("tests/simt")


def build(sanitize: bool = False, kernels: str = "*") -> Path:
    """Bring the library up to date and return its path; `kernels` chooses among csrc/cuda/kernels/*.cu."""
    torch = find_torch()
    if torch is None or not torch.is_new_enough:
        raise native.NativeBuildError(f"PyTorch {'.'.join(map(str, OLDEST_TORCH))} or newer was not found")
    variant = [torch.version, *["sanitize"] * sanitize, *[re.sub(r"\W+", "_", kernels)] * (kernels != "*")]
    directory = BUILDS / "-".join(variant)
    with _in_root(), _locked():
        library = _describe(directory, torch, sanitize, kernels)
        native.build([library], BUILDS, directory)
        if _write_stubs(library.path, directory):
            native.build([library], BUILDS, directory)
    return ROOT / library.path


def build_checks() -> Path:
    """Build the library of the simulator's own tests, which ctypes loads and which needs no torch."""
    compiler = native.find_compiler()
    directory = BUILDS / "checks"
    with _in_root(), _locked():
        library = native.Library(directory / "checks.so", compiler, link_flags=["-shared"])
        _add(library, directory, [*_simulator(), CHECKS / "check.cpp"], [])
        _add(library, directory, CHECKS.glob("*.cu"), KERNEL_FLAGS)
        native.build([library], BUILDS, directory)
    return ROOT / library.path


def _simulator() -> list[Path]:
    return [path for path in SIMULATOR.glob("*.cpp") if path.name != "module.cpp"]


def _add(library: native.Library, directory: Path, paths, flags: list[str]):
    flags = [*FLAGS, *["-mfma"] * _has_fma(), *flags]
    library.objects += [native.Object(str(path), directory, library.compiler, flags) for path in sorted(paths)]


@contextlib.contextmanager
def _in_root():
    directory = os.getcwd()
    os.chdir(ROOT)
    try:
        yield
    finally:
        os.chdir(directory)


@contextlib.contextmanager
def _locked():
    """Hold a lock on the build folder, because several test runs may build at once."""
    BUILDS.mkdir(parents=True, exist_ok=True)
    with open(BUILDS / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _describe(directory: Path, torch, sanitize: bool, kernels: str) -> native.Library:
    compiler = native.find_compiler()
    library = native.Library(directory / ("_C" + sysconfig.get_config_var("EXT_SUFFIX")), compiler)
    sanitizers = SANITIZE_FLAGS if sanitize else []
    target = f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"
    torch_flags = [f"-DTORCH_TARGET_VERSION={target}", f"-isystem{torch.directory / 'include'}"]

    _add(library, directory, _simulator(), sanitizers)
    # The files that launch the kernels are the same in every variant.
    launchers = [path for folder in ("", "stage", "cuda") for path in Path("csrc", folder).glob("*.cpp")]
    launchers = [path for path in launchers if path.name != "module.cpp"]
    _add(library, BUILDS / torch.version, launchers, torch_flags)
    _add(library, directory, [SIMULATOR / "module.cpp"], [*torch_flags, *_module_flags(torch, sanitize)])
    # The linker takes the first copy of an inline function that several files have, which has to be one without hooks.
    chosen = {path for glob in kernels.split(",") for path in Path("csrc/cuda/kernels").glob(f"{glob}.cu")}
    _add(library, directory, chosen, [*CUDA_FLAGS, *sanitizers] if sanitize else KERNEL_FLAGS)
    stubs = directory / STUBS
    directory.mkdir(exist_ok=True)
    stubs.touch()
    _add(library, directory, [stubs], [])
    library.link_flags = ["-shared", *sanitizers, f"-L{torch.directory / 'lib'}", "-ltorch_cpu", "-lc10"]
    return library


def _write_stubs(path: Path, directory: Path) -> bool:
    """Write a body that throws for each launch function without a chosen kernel file, so that the rest can load."""
    symbols = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    missing = re.findall(r"(_ZN12densenet_ext4cuda\S+)", symbols)
    if not missing:
        return False
    stubs = directory / STUBS
    text = stubs.read_text() or "#include <stdexcept>\n"
    for name in missing:
        body = f'throw std::runtime_error("simt: no kernel file of this build defines {name}");'
        text += f'extern "C" __attribute__((weak)) void {name}() {{ {body} }}\n'
    stubs.write_text(text)
    return True


def _module_flags(torch, sanitize: bool) -> list[str]:
    try:
        import pybind11

        includes = [pybind11.get_include()]
    except ImportError:
        includes = []  # torch brings a copy
    version = re.search(r'__version__ = "(.+)"', Path("densenet_ext/_version.py").read_text())[1]
    return [
        *(f"-isystem{path}" for path in [*includes, sysconfig.get_path("include")]),
        f'-DDENSENET_EXT_VERSION="{version}"',
        f'-DDENSENET_EXT_TORCH="{torch.version}"',
        f'-DDENSENET_EXT_SANITIZERS="{SANITIZERS if sanitize else ""}"',
    ]


def _has_fma() -> bool:
    try:
        return " fma " in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--kernels", default="*", metavar="GLOBS", help="only these, as in 'conv*,device_support'")
    arguments = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        path = build(arguments.sanitize, arguments.kernels)
    print(path)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except native.NativeBuildError as error:
        sys.exit(f"error: {error}")
