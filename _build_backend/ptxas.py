"""Reads the assembler's report on CUDA kernels: fails a build in which a kernel spills registers, and prints a table.

``python ptxas.py log nvcc …`` runs this nvcc command, which needs ``-Xptxas -v``, and keeps the report in ``log``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPORT = re.compile(r"ptxas info|ptxas warning : Registers are spilled|\s+\d+ bytes stack frame")


@dataclass
class Usage:
    """Resources of a kernel, or of a function that a kernel calls, which has no registers of its own."""

    function: str
    architecture: str
    registers: int | None = None
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0

    @property
    def spills(self) -> bool:
        return self.spill_stores > 0 or self.spill_loads > 0


def parse(report: str) -> list[Usage]:
    usages, kernel, architecture = [], "", ""
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(.+)' for '(\w+)'", line):
            kernel, architecture = found.groups()
        elif found := re.search(r"Function properties for (\S+)", line):
            usages.append(Usage(found[1], architecture))
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            usages[-1].stack, usages[-1].spill_stores, usages[-1].spill_loads = map(int, found.groups())
        elif found := re.search(r"Used (\d+) registers", line):
            of_kernel = next(usage for usage in reversed(usages) if usage.function == kernel)
            of_kernel.registers = int(found[1])
            shared = re.search(r"(\d+) bytes smem", line)
            of_kernel.shared = int(shared[1]) if shared else 0
    return usages


def readable(functions: list[str]) -> list[str]:
    """The names of these functions, demangled, without namespaces and parameters."""
    if shutil.which("c++filt"):
        text = "\n".join(functions)
        functions = subprocess.run(["c++filt"], input=text, capture_output=True, text=True).stdout.splitlines()
    return [_short(name) for name in functions]


def _short(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|\bdensenet_ext::|\bcuda::|^void ", "", name)
    if name.endswith(")"):
        depth = 0
        for i in reversed(range(len(name))):
            depth += (name[i] == ")") - (name[i] == "(")
            if depth == 0:
                return name[:i]
    return name


def table(reports: list[Path]) -> str:
    """The resources of all kernels. Shared memory is what the compiler fixes; spilled are bytes stored and loaded."""
    usages = [(path, usage) for path in reports for usage in parse(path.read_text())]
    names = readable([usage.function for _, usage in usages])
    rows = []
    for (path, usage), name in zip(usages, names, strict=True):
        registers = "" if usage.registers is None else usage.registers
        spilled = usage.spill_stores + usage.spill_loads
        rows.append((path.stem, name, usage.architecture, registers, usage.shared, usage.stack, spilled))
    rows = [
        ("source", "kernel", "architecture", "registers", "shared", "stack", "spilled"),
        *sorted(rows, key=lambda row: row[:3]),
    ]
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    aligned = [
        [
            f"{cell:<{width}}" if i < 3 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    return "\n".join("  ".join(row) for row in aligned)


def complaints(report: str) -> list[str]:
    spilling = [usage for usage in parse(report) if usage.spills]
    return [
        f"{name} for {usage.architecture} spills registers: "
        f"{usage.spill_stores} bytes stored, {usage.spill_loads} bytes loaded"
        for usage, name in zip(spilling, readable([usage.function for usage in spilling]), strict=True)
    ]


def main(log: str, *command: str) -> int:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    lines = done.stdout.splitlines(keepends=True)
    report = "".join(line for line in lines if REPORT.match(line))
    print("".join(line for line in lines if not REPORT.match(line)), end="")
    found = complaints(report) if done.returncode == 0 else []
    allowed = os.environ.get("DENSENET_EXT_ALLOW_SPILLS", "0") != "0"
    print("".join(f"{'warning' if allowed else 'error'}: {line}\n" for line in found), end="")
    if found and not allowed:
        Path(command[command.index("-o") + 1]).unlink()
        return 1
    Path(log).write_text(report)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
