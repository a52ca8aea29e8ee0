"""The library that was built: what it says of itself, what it is linked to, its instruction sets and its threads."""

import importlib.metadata
import os
import shutil
import subprocess
import sys

import pytest
import torch
from installed import EXTENSION, LIBRARY, ROOT, SUFFIX, needs_cuda_kernels, run_python

from densenet_ext._version import __version__

BUILT = EXTENSION.build_info()["instruction_sets"]
AVAILABLE = BUILT[: BUILT.index(EXTENSION.cpu_capability()) + 1]  # the lowest to the one in use

CORE = """
import sys
sys.path[:0] = {paths}
import torch
from kernel_cases import Problem, Shape
from test_kernels import OPS, check, fits, problems
from densenet_ext import DenseNetBC, _C
assert _C.cpu_capability() == {capability!r}, _C.cpu_capability()
shapes = [
    Shape("", samples=3, height=17, width=19, channels=21, bottleneck=20, growth=5),
    Shape("", channels=33, bottleneck=48, growth=12),
    Shape("in two chunks of channels", height=5, width=7, channels=101, bottleneck=48, growth=12),
    Shape("in blocks of rows, the last of them odd", height=57, width=40, channels=5, bottleneck=48, growth=7),
]
count = 0
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for op, variants in OPS.items():
        for shape in shapes:
            for options in variants:
                for problem in problems(shape, dtype, op):
                    check(op, getattr(problem, op)(**options), dtype)
                    count += 1
print("checked", count)
"""


def test_build_info():
    info = EXTENSION.build_info()
    assert info["version"] == __version__
    assert info["torch_target"] == "2.11"
    assert info["instruction_sets"][0] == "baseline"
    assert EXTENSION.cpu_capability() in info["instruction_sets"]
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert info["cuda"] == bool(info["cuda_architectures"]) == bool(info["cuda_version"]) == (not info["cuda_missing"])
    assert info["simulated"] is False


def test_version_of_the_installed_distribution():
    try:
        installed = importlib.metadata.version("densenet_ext")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("built in place, not installed")
    assert installed == __version__


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
@pytest.mark.parametrize("which", ["_C", pytest.param("_cuda", marks=needs_cuda_kernels)])
def test_library_names_no_directory_to_search(which):
    library = LIBRARY.with_name(f"{which}{SUFFIX}")
    dynamic = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in dynamic
    assert ("libtorch_cuda" in dynamic) == (which == "_cuda")
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    assert "libcudart" not in dynamic  # linked statically


@pytest.mark.slow
@pytest.mark.parametrize("capability", AVAILABLE)
def test_kernels_of_every_instruction_set_equal_their_twins(capability):
    """Every instruction set that this machine has, each in a process of its own."""
    paths = [str(ROOT / "tests" / "ops"), *sys.path]
    code = CORE.format(paths=paths, capability=capability)
    result = run_python("-c", code, DENSENET_EXT_CPU_CAPABILITY=capability)
    assert result.returncode == 0, result.stderr[-3000:]
    assert int(result.stdout.split()[-1]) > 200


@pytest.mark.repetitions(1)
@pytest.mark.parametrize("value", ["sse9", "AVX2 ", "avx1024"])
def test_unknown_instruction_set_is_an_error_that_says_what_there_is(value):
    code = f"import sys; sys.path[:0] = {sys.path}; from densenet_ext import DenseNetBC"
    result = run_python("-c", code, DENSENET_EXT_CPU_CAPABILITY=value)
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError")
    assert "DENSENET_EXT_CPU_CAPABILITY" in message and value in message and "baseline" in message


@pytest.mark.parametrize("threads", [1, 2])
def test_as_many_threads_run_as_torch_is_told(threads):
    """Torch's parallel loops are header templates elsewhere, and run on one thread where a build forgets a flag."""
    if threads > (os.cpu_count() or 1):
        pytest.skip("needs two cores")
    torch.set_num_threads(threads)  # the fixture that every test has puts the number back
    assert EXTENSION.parallel_threads() == threads
