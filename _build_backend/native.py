"""Compiles and links a shared library with ninja; what a changed header affects is rebuilt, and nothing else."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

MEMORY_PER_COMPILER = 1 << 30  # bytes, generously


class NativeBuildError(Exception):
    """What went wrong and what to do, in a sentence a user can act on."""


@dataclass(frozen=True)
class Compiler:
    command: tuple[str, ...]
    description: str

    def accepts(self, *flags: str, source: str = "int main() { return 0; }") -> bool:
        probe = [*self.command, "-Werror", *flags, "-fsyntax-only", "-x", "c++", "-"]
        return subprocess.run(probe, input=source, capture_output=True, text=True).returncode == 0


@dataclass
class Object:
    source: str
    flags: list[str]
    variant: str = ""  # names the instruction set where a source is compiled several times


@dataclass
class Library:
    path: Path
    objects: list[Object] = field(default_factory=list)  # in link order
    flags: list[str] = field(default_factory=list)
    link_flags: list[str] = field(default_factory=list)


def find_compiler() -> Compiler:
    """$CXX, else the first C++ compiler on the path."""
    if os.environ.get("CXX"):
        command = tuple(shlex.split(os.environ["CXX"]))
    else:
        name = next(filter(shutil.which, ("g++", "c++", "clang++")), None)
        if name is None:
            raise NativeBuildError(
                "no C++ compiler was found: install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; "
                "macOS: xcode-select --install) or set CXX to the one to use"
            )
        command = (name,)
    try:
        answer = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise NativeBuildError(
            f"the C++ compiler {shlex.join(command)!r} cannot be run: set CXX to the path of a C++17 compiler, or unset it"
        ) from None
    return Compiler(command, answer.splitlines()[0] if answer else command[-1])


def build(library: Library, compiler: Compiler, directory: Path, verbose: bool = False) -> None:
    """Brings library.path up to date; objects and ninja's records are kept in directory."""
    directory.mkdir(parents=True, exist_ok=True)
    steps = _write_ninja_file(library, compiler, directory)
    command = [_ninja(), "-f", str(directory / "build.ninja"), f"-j{_parallel_jobs()}"] + ["-v"] * verbose
    output = []
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(command, stdout=pipe, stderr=both, text=True, errors="replace") as ninja:
        for line in ninja.stdout:
            output.append(line)
            if line.strip() != "ninja: no work to do.":
                print(line, end="", flush=True)
    if ninja.returncode != 0:
        raise NativeBuildError(_explain_failure(output, steps, compiler))


def _write_ninja_file(library: Library, compiler: Compiler, directory: Path) -> dict[str, str]:
    """Returns what happens to each output file, in words."""
    steps = {str(library.path): f"linking {library.path.name}"}
    lines = [
        f"builddir = {_escape(directory)}",
        "rule compile",
        f"  command = {_shell(compiler.command)} $flags {_shell(library.flags)} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compiling $in$variant",
        "rule link",
        f"  command = {_shell(compiler.command)} $in -o $out {_shell(library.link_flags)}",
        "  description = linking $out",
    ]
    outputs = []
    for item in library.objects:
        output = directory / item.variant / Path(item.source).with_suffix(".o")
        outputs.append(_escape(output))
        variant = f" for {item.variant}" if item.variant else ""
        steps[str(output)] = f"compiling {item.source}{variant}"
        lines += [
            f"build {_escape(output)}: compile {_escape(item.source)}",
            f"  flags = {_shell(item.flags)}",
            f"  variant = {variant.replace(' ', '$ ', 1)}",
        ]
    lines += [f"build {_escape(library.path)}: link {' '.join(outputs)}", ""]
    text = "\n".join(lines)
    path = directory / "build.ninja"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return steps


def _shell(words) -> str:
    return shlex.join(words).replace("$", "$$")


def _escape(path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _ninja() -> str:
    path = os.environ.get("PATH", os.defpath)
    try:
        import ninja

        path = os.pathsep.join([ninja.BIN_DIR, path])
    except ImportError:
        pass
    found = shutil.which("ninja", path=path)
    if found is None:
        raise NativeBuildError("ninja was not found: pip install ninja")
    return found


def _parallel_jobs() -> int:
    """MAX_JOBS, else one compiler per core as far as memory allows."""
    if os.environ.get("MAX_JOBS"):
        try:
            return max(1, int(os.environ["MAX_JOBS"]))
        except ValueError:
            raise NativeBuildError(f"MAX_JOBS must be a whole number, but is {os.environ['MAX_JOBS']!r}") from None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(_available_memory() / MEMORY_PER_COMPILER)))


def _available_memory() -> float:
    available = float("inf")
    try:
        available = int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
        # a container's limit; the word "max" where there is none
        available = min(available, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, TypeError, ValueError):
        pass
    return available


def _explain_failure(output: list[str], steps: dict[str, str], compiler: Compiler) -> str:
    failed = next((i for i, line in enumerate(output) if line.startswith("FAILED:")), None)
    if failed is None:
        return "ninja failed: " + "".join(output[-5:]).strip()
    step = next((steps[path] for path in steps if path in output[failed]), "a step")
    said = []
    for line in output[failed + 2 :]:  # after the command
        if re.match(r"\[\d+/\d+\]|FAILED:|ninja:", line):
            break
        said.append(line.rstrip())
    text = "\n".join(said)
    first = next((i for i, line in enumerate(said) if re.search("error:|cannot find", line)), max(0, len(said) - 12))
    excerpt = "\n".join("    " + line for line in said[first : first + 12])
    if re.search(r"[Kk]illed|Cannot allocate memory|out of memory|bad_alloc", text):
        advice = "The compiler ran out of memory: set MAX_JOBS=1 and build again."
    elif "No space left" in text:
        advice = "The disk is full: make room, or set TMPDIR to a directory with some."
    elif "Python.h" in text:
        advice = "Install Python's headers (Debian, Ubuntu: apt install python3-dev) and build again."
    else:
        advice = f"If csrc/ is as released, please report this, with the compiler's version: {compiler.description}."
    return f"{step} failed:\n{excerpt}\n{advice}"
