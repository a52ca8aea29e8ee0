"""Builds densenet_ext/_C and, if nvcc fits torch, densenet_ext/_cuda from csrc/. Metadata is in pyproject.toml.

The CPU kernels are compiled once for each instruction set, the CUDA kernels once for all architectures.
`python setup.py cuda_registers` prints the resources that each CUDA kernel uses.

Environment variables: CXX, CXXFLAGS, LDFLAGS as usual; MAX_JOBS limits how many compilers run at once;
DENSENET_EXT_SANITIZE=address,undefined builds with these sanitizers; DENSENET_EXT_CUDA=1 makes it an error if the CUDA
kernels cannot be built, =0 leaves them out; CUDA_HOME or CUDACXX says where nvcc is, TORCH_CUDA_ARCH_LIST what to build
for; DENSENET_EXT_ALLOW_SPILLS=1 accepts kernels that spill registers.
"""

import os
import platform
import shlex
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent / "_build_backend"))

import native  # noqa: E402
import nvcc  # noqa: E402
import ptxas  # noqa: E402
from target import OLDEST_TORCH, find_torch  # noqa: E402

COMMON_FLAGS = [
    "-std=c++17",
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
# These flags are used if the compiler knows them. Predictive commoning would spill the accumulators of register-blocked
# kernels, and GCC 12 warns of uninitialized variables in its own AVX-512 header.
GCC_FLAGS = ["-fno-predictive-commoning", "-Wno-maybe-uninitialized"]

AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {"avx2": AVX2_FLAGS, "avx512": AVX512_FLAGS}
# AMX serves matrix products only, in kernels that use AVX-512 otherwise. It is left out if compiler or assembler are
# too old.
AMX_FLAGS = [*AVX512_FLAGS, "-mavx512bf16"]
AMX_KERNELS = "cpu/kernels/amx/*.cpp"
AMX_EXAMPLE = '#include <immintrin.h>\nvoid f() { asm volatile("tdpbf16ps %tmm2, %tmm1, %tmm0"); }\n'

# With -O1, files that check arguments and call kernels take a third less time to compile and run as fast.
HOST_OPTIMIZATION, KERNEL_OPTIMIZATION = "-O1", "-O3"
HOST_KERNELS = [os.path.join("csrc", "cpu", "fold_norm.cpp")]  # such a file, but with loops over tensors

NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v", "-Icsrc"]

SANITIZERS = os.environ.get("DENSENET_EXT_SANITIZE", "")


def find_sources(*patterns):
    return [str(path) for pattern in patterns for path in sorted(Path("csrc").glob(pattern))]


def cpp_sources():
    return find_sources("*.cpp", "stage/*.cpp", "cpu/*.cpp")


def cpu_kernels():
    return find_sources("cpu/kernels/*.cpp")


def amx_kernels(compiler):
    if "avx512" in INSTRUCTION_SETS and compiler.accepts(*AMX_FLAGS, source=AMX_EXAMPLE):
        return find_sources(AMX_KERNELS)
    return []


def cuda_sources():
    """The sources for the C++ compiler, and the kernels for nvcc."""
    return find_sources("cuda/*.cpp"), find_sources("cuda/kernels/*.cu")


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
    # <charconv> was the last of C++17's headers to be implemented: a compiler that has it knows the language, too.
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


def cpp_flags(compiler, optimization):
    accepted = filter(compiler.accepts, GCC_FLAGS)
    flags = [*COMMON_FLAGS, optimization, *accepted, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    return [*flags, "-O1", "-g1", *sanitizer_flags()] if SANITIZERS else flags


def link_flags(torch, *libraries):
    # There is no rpath: `import torch` comes first and loads these libraries, wherever they are.
    flags = ["-shared", *sanitizer_flags(), f"-L{torch.directory / 'lib'}", *libraries]
    if sys.platform == "darwin":
        flags += ["-undefined", "dynamic_lookup"]
    return [*flags, *shlex.split(os.environ.get("LDFLAGS", ""))]


def version_flag(version):
    return f'-DDENSENET_EXT_VERSION="{version}"'


def module_flags(version, torch, toolkit, instruction_sets):
    """Flags for module.cpp alone: the facts that it reports, and the headers that it includes."""
    try:
        import pybind11

        pybind11_include = [pybind11.get_include()]
    except ImportError:
        pybind11_include = []  # torch brings a copy

    def text(value):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'

    missing = toolkit.reason if isinstance(toolkit, nvcc.NoCuda) else ""
    architectures = () if missing else toolkit.architectures
    return [
        *(f"-isystem{path}" for path in [*pybind11_include, sysconfig.get_path("include")]),
        version_flag(version),
        f"-DDENSENET_EXT_TORCH={text(torch.version)}",
        f"-DDENSENET_EXT_INSTRUCTION_SETS={', '.join(map(text, instruction_sets))}",
        f"-DDENSENET_EXT_SANITIZERS={text(SANITIZERS)}",
        f"-DDENSENET_EXT_CUDA_VERSION={text('' if missing else toolkit.version)}",
        f"-DDENSENET_EXT_CUDA_ARCHITECTURES={', '.join(map(text, architectures))}",
        f"-DDENSENET_EXT_CUDA_MISSING={text(missing)}",
    ]


def describe_library(path, root, compiler, torch, version, toolkit):
    """The library _C. Objects that depend on torch's version go to the library's folder."""
    host, kernel = cpp_flags(compiler, HOST_OPTIMIZATION), cpp_flags(compiler, KERNEL_OPTIMIZATION)
    library = native.Library(path, compiler)
    library.link_flags = link_flags(torch, "-ltorch_cpu", "-lc10")
    amx = amx_kernels(compiler)
    extras = {
        os.path.join("csrc", "module.cpp"): module_flags(
            version, torch, toolkit, [*INSTRUCTION_SETS, *["amx"][: len(amx)]]
        ),
        os.path.join("csrc", "cpu", "dispatch.cpp"): ["-DDENSENET_EXT_AMX"] if amx else [],
    }
    for source in cpp_sources():
        flags = [*extras.get(source, []), *torch_flags(torch), *(kernel if source in HOST_KERNELS else host)]
        library.objects.append(native.Object(source, path.parent, compiler, flags))
    # Kernels know nothing of torch, so another torch needs none of them compiled again.
    # The linker keeps the first copy of an inline function, so the instruction set of every machine has to come first.
    for name, extra in INSTRUCTION_SETS.items():
        for source in cpu_kernels():
            library.objects.append(
                native.Object(source, root / "kernels", compiler, [*extra, f"-DDENSENET_EXT_ISA={name}", *kernel], name)
            )
    for source in amx:
        library.objects.append(
            native.Object(source, root / "kernels", compiler, [*AMX_FLAGS, "-DDENSENET_EXT_ISA=amx", *kernel], "amx")
        )
    return library


def describe_cuda_library(path, root, compiler, torch, version, toolkit):
    """The library _cuda, which can be loaded only if torch has CUDA."""
    sources, kernels = cuda_sources()
    architectures, library = toolkit.architectures, native.Library(path, compiler)
    library.link_flags = link_flags(torch, "-ltorch_cuda", "-ltorch_cpu", "-lc10", *toolkit.libraries)
    directory = root / "kernels" / f"cuda-{toolkit.version}-{'_'.join(architectures)}"
    for source in kernels:
        flags = [*NVCC_FLAGS, *nvcc.architecture_flags(architectures)]
        if os.path.basename(source) == "device_support.cu":
            flags.append(f"-DDENSENET_EXT_CUDA_ARCHITECTURES={':'.join(architectures)}")
        library.objects.append(native.Object(source, directory, toolkit, flags))
    host = cpp_flags(compiler, HOST_OPTIMIZATION)
    for source in sources:
        extra = [version_flag(version)] if source == os.path.join("csrc", "cuda", "module.cpp") else []
        flags = ["-DUSE_CUDA", *extra, *torch_flags(torch), *host]
        library.objects.append(native.Object(source, path.parent, compiler, flags))
    return library


class BuildExtension(build_ext):
    def finalize_options(self):
        super().finalize_options()
        # Always copy the library to its place, even over a newer one built with another torch; ninja decides the rest.
        self.force = True

    def build_extensions(self):
        try:
            self._build()
        except native.NativeBuildError as error:
            raise CompileError(str(error)) from None

    def _build(self):
        compiler, torch = required_compiler(), required_torch()
        self.toolkit = nvcc.find_cuda(torch, any(cuda_sources()), bool(SANITIZERS))
        without_cuda = isinstance(self.toolkit, nvcc.NoCuda)
        if without_cuda:
            self.extensions = [ext for ext in self.extensions if ext.name != "densenet_ext._cuda"]
            print(f"CUDA kernels: none, {self.toolkit.reason}", flush=True)
        else:
            architectures = ", ".join(self.toolkit.architectures)
            print(f"CUDA kernels: for {architectures}, with {self.toolkit.description}", flush=True)
        # Each torch has its own directory, so that going back and forth between two compiles nothing again.
        root = Path(self.build_temp, *filter(None, [SANITIZERS.replace(",", "-")]))
        directory = root / f"torch-{torch.version}"
        paths = [directory / os.path.basename(self.get_ext_fullpath(ext.name)) for ext in self.extensions]
        facts = root, compiler, torch, self.distribution.get_version(), self.toolkit
        libraries = [describe_library(paths[0], *facts)]
        if not without_cuda:
            libraries.insert(0, describe_cuda_library(paths[1], *facts))  # it takes longest, so it starts first
        native.build(libraries, root, directory, self.verbose > 1)
        for ext, path in zip(self.extensions, paths, strict=True):
            destination = self.get_ext_fullpath(ext.name)
            os.makedirs(os.path.dirname(destination), exist_ok=True)
            self.copy_file(str(path), destination)
        objects = sum((library.objects for library in libraries), [])
        self.cuda_reports = [nvcc.report_of(item.path) for item in objects if item.compiler is self.toolkit]


class CudaRegisters(Command):
    description = "build, and print the registers and the memory that each CUDA kernel uses"
    user_options = []

    def initialize_options(self):
        pass

    def finalize_options(self):
        pass

    def run(self):
        self.run_command("build_ext")
        build = self.get_finalized_command("build_ext")
        if isinstance(build.toolkit, nvcc.NoCuda):
            raise CompileError(f"there are no CUDA kernels here: {build.toolkit.reason}")
        print(ptxas.table(build.cuda_reports))


setup(
    # _cuda is left out where it cannot be built
    ext_modules=[
        Extension("densenet_ext._C", sources=[*cpp_sources(), *cpu_kernels()]),
        Extension("densenet_ext._cuda", sources=sum(cuda_sources(), [])),
    ],
    cmdclass={"build_ext": BuildExtension, "cuda_registers": CudaRegisters},
)
