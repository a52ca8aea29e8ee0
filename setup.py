"""Builds densenet_ext/_C from csrc/: the kernels once per instruction set, the rest once. Metadata: pyproject.toml.

Environment variables: CXX, CXXFLAGS, LDFLAGS as usual; MAX_JOBS limits how many compilers run at once;
DENSENET_EXT_SANITIZE=address,undefined builds with these sanitizers.
"""

import os
import platform
import shlex
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent / "_build_backend"))

import native  # noqa: E402
from target import OLDEST_TORCH, find_torch  # noqa: E402

COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-Wall",
    "-Wextra",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Icsrc",
]
# Used where the compiler knows them. Predictive commoning spills the accumulators of the register-blocked kernels, and
# GCC 12 finds uninitialized variables in its own AVX-512 header.
GCC_FLAGS = ["-fno-predictive-commoning", "-Wno-maybe-uninitialized"]

AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {"avx2": AVX2_FLAGS, "avx512": AVX512_FLAGS}

SANITIZERS = os.environ.get("DENSENET_EXT_SANITIZE", "")


def find_sources():
    """Those compiled once, and the kernels, compiled once per instruction set."""
    once = sorted([*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")])
    return [str(path) for path in once], [str(path) for path in sorted(Path("csrc/cpu/kernels").glob("*.cpp"))]


def required_torch():
    torch = find_torch()
    oldest = f"{OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"
    if torch is None:
        raise native.NativeBuildError(f"PyTorch was not found: pip install 'torch>={oldest}'")
    if not torch.is_new_enough:
        raise native.NativeBuildError(
            f"PyTorch {oldest} or newer is needed, but this is {torch.version}: pip install --upgrade torch"
        )
    return torch


def required_compiler():
    compiler = native.find_compiler()
    # <charconv> came last of C++17's headers: with it, the language is there too
    newest_flags = INSTRUCTION_SETS.get("avx512", [])
    if not compiler.accepts("-std=c++17", *newest_flags, source="#include <charconv>\n#include <optional>\n"):
        raise native.NativeBuildError(
            f"{compiler.description} does not compile C++17: install g++ 9, clang 10 or newer and set CXX to it"
        )
    return compiler


def sanitizer_flags():
    if not SANITIZERS:
        return []
    return [f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def torch_flags(torch):
    target = f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"
    return [f"-DTORCH_TARGET_VERSION={target}", f"-isystem{torch.directory / 'include'}"]


def module_flags(version, torch):
    """What module.cpp reports and nothing else needs, and the headers that it alone includes."""
    try:
        import pybind11

        pybind11_include = [pybind11.get_include()]
    except ImportError:
        pybind11_include = []  # torch brings a copy
    names = ", ".join(f'"{name}"' for name in INSTRUCTION_SETS)
    return [
        *(f"-isystem{path}" for path in [*pybind11_include, sysconfig.get_path("include")]),
        f'-DDENSENET_EXT_VERSION="{version}"',
        f'-DDENSENET_EXT_TORCH="{torch.version}"',
        f"-DDENSENET_EXT_INSTRUCTION_SETS={names}",
        f'-DDENSENET_EXT_SANITIZERS="{SANITIZERS}"',
    ]


def describe_library(path, compiler, torch, version):
    once, kernels = find_sources()
    library = native.Library(path)
    library.flags = [*COMMON_FLAGS, *filter(compiler.accepts, GCC_FLAGS), *shlex.split(os.environ.get("CXXFLAGS", ""))]
    if SANITIZERS:
        library.flags += ["-O1", "-g1", *sanitizer_flags()]
    library.link_flags = ["-shared", *sanitizer_flags(), f"-L{torch.directory / 'lib'}", "-ltorch_cpu", "-lc10"]
    # No rpath: `import torch` comes first and has these libraries in the process, wherever they are.
    if sys.platform == "darwin":
        library.link_flags += ["-undefined", "dynamic_lookup"]
    library.link_flags += shlex.split(os.environ.get("LDFLAGS", ""))

    for source in once:
        extra = module_flags(version, torch) if source == os.path.join("csrc", "module.cpp") else []
        library.objects.append(native.Object(source, [*extra, *torch_flags(torch)]))
    # The kernels know nothing of torch, so that another torch, or pip with its own copy of one, compiles none of them again.
    # The linker keeps the first copy of an inline function, so the one that every machine can run has to come first.
    for name, flags in INSTRUCTION_SETS.items():
        for source in kernels:
            library.objects.append(native.Object(source, [*flags, f"-DDENSENET_EXT_ISA={name}"], name))
    return library


class BuildExtension(build_ext):
    def finalize_options(self):
        super().finalize_options()
        # Have the library copied to its place even over a newer one, built with another torch; ninja decides the rest.
        self.force = True

    def build_extension(self, ext):
        try:
            compiler, torch = required_compiler(), required_torch()
            # a directory for each torch, so that going back and forth between two compiles nothing again
            directory = Path(self.build_temp, f"torch-{torch.version}", *filter(None, [SANITIZERS.replace(",", "-")]))
            path = directory / os.path.basename(self.get_ext_fullpath(ext.name))
            library = describe_library(path, compiler, torch, self.distribution.get_version())
            native.build(library, compiler, directory, self.verbose > 1)
        except native.NativeBuildError as error:
            raise CompileError(str(error)) from None
        destination = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(destination), exist_ok=True)
        self.copy_file(str(path), destination)


setup(
    ext_modules=[Extension("densenet_ext._C", sources=sum(find_sources(), []))],
    cmdclass={"build_ext": BuildExtension},
)
