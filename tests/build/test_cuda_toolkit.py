"""CUDA in the build: which toolkit compiles the kernels, for which devices, and why none does."""

import subprocess
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from installed import ROOT, needs_compiler, run, write


@pytest.mark.parametrize(
    "text, expected",
    [
        ("8.0;8.6;9.0+PTX", ("8.0", "8.6", "9.0+PTX")),  # torch's form; what is named is compiled
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
def install(tmp_path):
    """Return the command of an nvcc that answers what the build asks."""

    def install(version, probe="exit 0", runtime=True):
        directory = tmp_path / version
        script = (
            '#!/bin/sh\ncase "$*" in\n'
            f'*--version*) echo "Cuda compilation tools, release {version}, V{version}.88";;\n'
            f"*-E) {probe};;\n"
            f'*-dryrun) echo \'#$ LIBRARIES=  "-L{directory}/stubs" "-L{directory}"\' >&2;;\nesac\n'
        )
        write(directory, {"nvcc": script, **({"libcudart_static.a": ""} if runtime else {})})
        return (str(directory / "nvcc"),)

    return install


@pytest.fixture
def find_cuda(nvcc, monkeypatch):
    """find_cuda() for a torch with this version of CUDA, where there are these compilers and no others."""

    def find(torch_cuda, *compilers, **options):
        monkeypatch.setattr(nvcc, "_compilers", lambda: compilers)
        return nvcc.find_cuda(nvcc.Torch(Path("/torch"), "2.11.0", torch_cuda), **options)

    return find


def test_nvcc_that_fits_torch(find_cuda, install, tmp_path, monkeypatch):
    compilers = install("12.9"), install("13.2")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    toolkit = find_cuda("13.0", *compilers)  # the first of the same major version
    assert toolkit.version == "13.2" and toolkit.architectures == ("9.0",)
    assert f"-L{tmp_path / '13.2'}" in toolkit.libraries and "-lcudart_static" in toolkit.libraries
    assert find_cuda("12.6", *compilers).version == "12.9"


UNSUPPORTED = "echo 'host_config.h: error: unsupported GNU version' >&2; exit 1"

# CUDA of torch; what nvcc is installed; the reason
NO_KERNELS = {
    "a torch without CUDA": (None, {"version": "13.0"}, "torch 2.11.0 is built without CUDA"),
    "another version": ("13.0", {"version": "12.9"}, "*nvcc is of CUDA 12.9, and torch of CUDA 13.0"),
    "an nvcc that refuses the system": (
        "13.0",
        {"version": "13.0", "probe": UNSUPPORTED},
        "*cannot compile here (host_config.h: error: unsupported GNU*",
    ),
    "no static runtime": ("13.0", {"version": "13.0", "runtime": False}, "*has no libcudart_static.a"),
}


@pytest.mark.parametrize(("torch_cuda", "toolkit", "reason"), NO_KERNELS.values(), ids=NO_KERNELS)
def test_no_cuda_kernels(find_cuda, install, torch_cuda, toolkit, reason):
    found = find_cuda(torch_cuda, install(**toolkit)).reason
    assert fnmatchcase(found, reason), found


def test_no_cuda_kernels_without_nvcc(find_cuda):
    assert find_cuda("13.0", ("/nonexistent/nvcc",)).reason == "nvcc was not found"


def test_cuda_forced(find_cuda, install, native_error, monkeypatch):
    monkeypatch.setenv("DENSENET_EXT_CUDA", "1")
    compiler = install("13.0")
    assert find_cuda("13.2", compiler).version == "13.0"
    with pytest.raises(native_error, match="torch 2.11.0 is built without CUDA: install one with CUDA"):
        find_cuda(None, compiler)
    with pytest.raises(native_error, match="nvcc was not found: install the toolkit of CUDA 13, .* set CUDA_HOME"):
        find_cuda("13.2")
    with pytest.raises(native_error, match="a build with sanitizers: unset DENSENET_EXT_SANITIZE"):
        find_cuda("13.2", sanitized=True)


def test_cuda_must_be_forced_or_not(find_cuda, native_error, monkeypatch):
    monkeypatch.setenv("DENSENET_EXT_CUDA", "yes")
    with pytest.raises(native_error, match="DENSENET_EXT_CUDA must be 0, 1 or unset, but is 'yes'"):
        find_cuda("13.0")
