"""Compiles and links shared libraries with ninja, which rebuilds only what a change affects, headers included."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

MEMORY_PER_COMPILER = 1 << 30  # bytes, generously


class NativeBuildError(Exception):
    """A build failed; the message says what went wrong and what to do about it."""


@dataclass(frozen=True)
class Compiler:
    command: tuple[str, ...]
    description: str

    def accepts(self, *flags: str, source: str = "int main() { return 0; }") -> bool:
        probe = [*self.command, "-Werror", *flags, "-fsyntax-only", "-x", "c++", "-"]
        return subprocess.run(probe, input=source, capture_output=True, text=True).returncode == 0

    def compile(self, source: str, output: str, flags: list[str]) -> list[str]:
        """The command that compiles; it also lists the files that it has read in output.d."""
        return [*self.command, *flags, "-MMD", "-MF", f"{output}.d", "-c", source, "-o", output]


@dataclass
class Object:
    source: str
    directory: Path
    compiler: Compiler
    flags: list[str]
    variant: str = ""  # the instruction set, if a source is compiled for several

    @property
    def path(self) -> Path:
        return self.directory / self.variant / Path(self.source).with_suffix(".o")


@dataclass
class Library:
    path: Path
    compiler: Compiler
    objects: list[Object] = field(default_factory=list)  # in link order
    link_flags: list[str] = field(default_factory=list)


@dataclass
class Step:
    output: str
    inputs: list[str]
    command: list[str]
    description: str
    tool: str  # the compiler's name and version, for error messages
    depfile: str = ""


def find_compiler() -> Compiler:
    """Return $CXX, else the first C++ compiler on the path."""
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


def build(libraries: list[Library], root: Path, directory: Path, verbose: bool = False) -> None:
    """Bring the libraries up to date. `directory` gets ninja's plan, `root` its records of all builds below."""
    directory.mkdir(parents=True, exist_ok=True)
    steps = [step for library in libraries for step in _steps(library)]
    os.environ["DENSENET_EXT_PYTHON"] = sys.executable
    ninja = _find_ninja()
    if ninja is None:
        print("ninja was not found: building without it (pip install ninja)", flush=True)
        output = _run_without_ninja(steps)
    else:
        plan = _write_ninja_file(steps, root, directory)
        output = _run([ninja, "-f", str(plan), f"-j{_parallel_jobs()}"] + ["-v"] * verbose)
    if output is not None:
        raise NativeBuildError(_explain_failure(output, steps))


def _steps(library: Library) -> list[Step]:
    steps = []
    for item in library.objects:
        output = str(item.path)
        command = item.compiler.compile(item.source, output, item.flags)
        description = f"compiling {item.source}" + (f" for {item.variant}" if item.variant else "")
        steps.append(
            Step(output, [item.source], command, description, item.compiler.description, depfile=f"{output}.d")
        )
    inputs = [step.output for step in steps]
    command = [*library.compiler.command, *inputs, "-o", str(library.path), *library.link_flags]
    steps.append(Step(str(library.path), inputs, command, f"linking {library.path.name}", library.compiler.description))
    return steps


def _write_ninja_file(steps: list[Step], root: Path, directory: Path) -> Path:
    lines = [
        f"builddir = {_escape(root)}",
        "rule compile",
        "  command = $words",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $words",
    ]
    for step in steps:
        rule = "compile" if step.depfile else "link"
        lines += [
            f"build {_escape(step.output)}: {rule} {' '.join(map(_escape, step.inputs))}",
            f"  words = {_shell(step.command).replace('$', '$$')}",
            f"  description = {step.description.replace('$', '$$')}",
        ]
    text = "\n".join([*lines, ""])
    path = directory / "build.ninja"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def _run(command: list[str]) -> list[str] | None:
    """Run ninja and show what it prints. Returns its output if it failed, else None."""
    output = []
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(command, stdout=pipe, stderr=both, text=True, errors="replace") as ninja:
        for line in ninja.stdout:
            output.append(line)
            if line.strip() != "ninja: no work to do.":
                print(line, end="", flush=True)
    return output if ninja.returncode != 0 else None


def _run_without_ninja(steps: list[Step]) -> list[str] | None:
    """Run each step whose command or inputs have changed, compilers first. Returns the output of a step that failed."""

    def run(step: Step) -> list[str] | None:
        record = Path(f"{step.output}.command")
        command = _shell(step.command)
        if not _outdated(step, command, record):
            return None
        print(f"{step.description}\n", end="", flush=True)
        record.unlink(missing_ok=True)
        Path(step.output).parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(step.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            lines = [f"FAILED: {step.output}\n", f"{command}\n", *done.stdout.splitlines(keepends=True)]
            print("".join(lines), end="", flush=True)
            return lines
        print(done.stdout, end="", flush=True)
        record.write_text(command)
        return None

    for phase in ([step for step in steps if step.depfile], [step for step in steps if not step.depfile]):
        with ThreadPoolExecutor(_parallel_jobs()) as pool:
            running = [pool.submit(run, step) for step in phase]
            for future in running:
                if future.result() is not None:
                    pool.shutdown(cancel_futures=True)
                    return future.result()
    return None


def _outdated(step: Step, command: str, record: Path) -> bool:
    try:
        inputs = list(step.inputs)
        if step.depfile:
            inputs += Path(step.depfile).read_text().replace("\\\n", " ").partition(":")[2].split()
        newest = max(os.stat(path).st_mtime for path in inputs)
        return record.read_text() != command or os.stat(step.output).st_mtime < newest
    except OSError:
        return True


def _shell(command: list[str]) -> str:
    # A variable stands for this Python, so that another environment's Python does not change the commands.
    return " ".join('"$DENSENET_EXT_PYTHON"' if word == sys.executable else shlex.quote(word) for word in command)


def _escape(path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _find_ninja() -> str | None:
    path = os.environ.get("PATH", os.defpath)
    try:
        import ninja

        path = os.pathsep.join([ninja.BIN_DIR, path])
    except ImportError:
        pass
    return shutil.which("ninja", path=path)


def _parallel_jobs() -> int:
    """Return MAX_JOBS, else one compiler a core as far as memory allows."""
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
        # This is a container's limit; the word "max" stands for none.
        available = min(available, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, TypeError, ValueError):
        pass
    return available


def _explain_failure(output: list[str], steps: list[Step]) -> str:
    failed = next((i for i, line in enumerate(output) if line.startswith("FAILED:")), None)
    if failed is None:
        return "ninja failed: " + "".join(output[-5:]).strip()
    step = next((step for step in steps if step.output in output[failed]), steps[-1])
    said = []
    for line in output[failed + 2 :]:  # after the command
        if re.match(r"\[\d+/\d+\]|FAILED:|ninja:", line):
            break
        said.append(line.rstrip())
    text = "\n".join(said)
    first = next(
        (i for i, line in enumerate(said) if re.search("error:|fatal|cannot find", line)), max(0, len(said) - 12)
    )
    excerpt = "\n".join("    " + line for line in said[first : first + 12])
    if re.search(r"[Kk]illed|Cannot allocate memory|out of memory|bad_alloc", text):
        advice = "The compiler ran out of memory: set MAX_JOBS=1 and build again."
    elif "No space left" in text:
        advice = "The disk is full: make room, or set TMPDIR to a directory with some."
    elif "Python.h" in text:
        advice = "Install Python's headers (Debian, Ubuntu: apt install python3-dev) and build again."
    elif "spills registers" in text:
        advice = (
            f"Such a kernel is slow. {step.tool} compiled it; another version may not spill. "
            "DENSENET_EXT_ALLOW_SPILLS=1 builds it as it is, DENSENET_EXT_CUDA=0 leaves the CUDA kernels out."
        )
    else:
        advice = f"If csrc/ is as released, please report this, with the compiler's version: {step.tool}."
        if step.inputs[0].endswith(".cu"):
            advice += " DENSENET_EXT_CUDA=0 leaves the CUDA kernels out."
    return f"{step.description} failed:\n{excerpt}\n{advice}"
