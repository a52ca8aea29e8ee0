"""Decides whether the CUDA kernels are built, with which nvcc, and for which architectures."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from native import Compiler, NativeBuildError
from target import Torch

OLDEST = (8, 0)  # compute capability: the kernels use its asynchronous copies and bfloat16 products
# "native" stands for these, too, because a machine that builds often has no GPU. Code for 8.0 runs on 8.6 and 8.9; code
# for each of them would double the time of the build. PTX serves all newer devices.
DEFAULT_ARCHITECTURES = "8.0 9.0+PTX"
NAMED_ARCHITECTURES = {
    "Ampere": "8.0 8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0 10.3 12.0 12.1+PTX",
    "native": DEFAULT_ARCHITECTURES,
}
PTXAS = os.path.join(os.path.basename(os.path.dirname(__file__)), "ptxas.py")


@dataclass(frozen=True)
class NoCuda:
    """The CUDA kernels are not built: the reason, and what the user can do about it."""

    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class Toolkit(Compiler):
    """nvcc, and its CUDA runtime, which is linked statically.

    torch's runtime may be of an older minor version than this compiler, whose code needs a runtime as new as itself.
    Several runtimes can share a process, its contexts and its streams; torch's libraries bring some, too.
    """

    version: str
    libraries: tuple[str, ...]  # linker options
    architectures: tuple[str, ...]

    def compile(self, source: str, output: str, flags: list[str]) -> list[str]:
        return [sys.executable, PTXAS, str(report_of(output)), *super().compile(source, output, flags)]


def report_of(output: str | Path) -> Path:
    """The file in which ptxas.py keeps the assembler's report on an object's kernels."""
    return Path(output).with_suffix(".cu.ptxas")


def find_cuda(torch: Torch, have_sources: bool = True, sanitized: bool = False) -> Toolkit | NoCuda:
    """Find the toolkit to build with. DENSENET_EXT_CUDA=1 makes it an error to find none; =0 looks for none."""
    wanted = os.environ.get("DENSENET_EXT_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise NativeBuildError(f"DENSENET_EXT_CUDA must be 0, 1 or unset, but is {wanted!r}")
    if wanted == "0":
        found = NoCuda("switched off by DENSENET_EXT_CUDA=0")
    elif not have_sources:
        found = NoCuda("csrc/cuda is empty", "take the sources from a clone or a source distribution")
    elif sanitized:
        found = NoCuda("this is a build with sanitizers", "unset DENSENET_EXT_SANITIZE")
    else:
        found = _find_toolkit(torch)
    if wanted == "1" and isinstance(found, NoCuda):
        raise NativeBuildError(f"DENSENET_EXT_CUDA=1, but {found.reason}: {found.remedy}")
    return found


def parse_architectures(text: str) -> tuple[str, ...]:
    """Parse TORCH_CUDA_ARCH_LIST, such as "8.0;9.0+PTX". Suffixes (9.0a) are dropped: no kernel needs what they add."""
    words = re.split(r"[;,\s]+", text.strip())
    words = " ".join(NAMED_ARCHITECTURES.get(word, word) for word in words).split()
    architectures = {}
    for word in words:
        parts = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", word)
        if parts is None:
            names = ", ".join(NAMED_ARCHITECTURES)
            raise NativeBuildError(
                f"TORCH_CUDA_ARCH_LIST has {word!r}, which is no architecture: write it like '8.0;9.0+PTX', or {names}"
            )
        number = int(parts[1]), int(parts[2])
        if number < OLDEST:
            raise NativeBuildError(
                f"TORCH_CUDA_ARCH_LIST has {word}, and the CUDA kernels need 8.0 (Ampere) or newer: take it off the list, "
                "or set DENSENET_EXT_CUDA=0 to leave the CUDA kernels out"
            )
        architectures[number] = architectures.get(number, "") or parts[3] or ""
    return tuple(f"{major}.{minor}{ptx}" for (major, minor), ptx in sorted(architectures.items()))


def architecture_flags(architectures: tuple[str, ...]) -> list[str]:
    flags = []
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def _find_toolkit(torch: Torch) -> Toolkit | NoCuda:
    if torch.cuda is None:
        return NoCuda(
            f"torch {torch.version} is built without CUDA",
            "install one with CUDA (https://pytorch.org/get-started/locally)",
        )
    major = torch.cuda.partition(".")[0]
    remedy = f"install the toolkit of CUDA {major}, with nvcc, and set CUDA_HOME to where it is"
    versions = {command: version for command in _compilers() if (version := _version(command))}
    if not versions:
        return NoCuda("nvcc was not found", remedy)
    for command, version in versions.items():
        if version.partition(".")[0] == major:
            return _examine(command, version)
    command, version = next(iter(versions.items()))
    return NoCuda(f"{command[0]} is of CUDA {version}, and torch of CUDA {torch.cuda}", remedy)


def _compilers() -> list[tuple[str, ...]]:
    """The commands of nvcc to try: of $CUDA_HOME, $CUDACXX, on the path, in the usual place."""
    commands = []
    if home := os.environ.get("CUDA_HOME"):
        commands.append((os.path.join(home, "bin", "nvcc"),))
    if command := os.environ.get("CUDACXX"):
        commands.append(tuple(shlex.split(command)))
    if path := shutil.which("nvcc"):
        commands.append((path,))
    commands.append(("/usr/local/cuda/bin/nvcc",))
    return commands


def _version(command: tuple[str, ...]) -> str | None:
    try:
        answer = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+\.\d+)", answer)
    return found[1] if found else None


def _examine(command: tuple[str, ...], version: str) -> Toolkit | NoCuda:
    """Check that this nvcc accepts the host compiler and the architectures, and has the static runtime beside it."""
    if os.environ.get("CXX"):
        command = (*command, "-ccbin", shlex.split(os.environ["CXX"])[-1])
    architectures = parse_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES)
    options = ["-std=c++17", *architecture_flags(architectures), "-x", "cu", os.devnull]
    probe = subprocess.run([*command, *options, "-E"], capture_output=True, text=True)
    if probe.returncode != 0:
        said = next(
            (line for line in probe.stderr.splitlines() if re.search("error|fatal", line)), probe.stderr.strip()
        )
        return NoCuda(
            f"{command[0]} cannot compile here ({said})",
            "set CXX to a compiler that it supports, and TORCH_CUDA_ARCH_LIST to architectures that it knows",
        )
    plan = subprocess.run([*command, *options, "-dryrun"], capture_output=True, text=True).stderr
    line = re.search(r"^#\$ LIBRARIES=(.*)$", plan, re.MULTILINE)
    directories = [word for word in shlex.split(line[1] if line else "") if word.startswith("-L")]
    if not any(Path(word[2:], "libcudart_static.a").exists() for word in directories):
        return NoCuda(
            f"{command[0]} has no libcudart_static.a",
            "install the static CUDA runtime of that toolkit (Debian, Ubuntu: cuda-cudart-dev)",
        )
    libraries = (*directories, "-lcudart_static", "-lrt", "-lpthread", "-ldl")
    return Toolkit(command, f"nvcc {version}", version, libraries, architectures)
