"""What a measurement was made on and with, for every table and file of results."""

import argparse
import csv
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

import densenet_ext
from densenet_ext import info

ROOT = Path(__file__).resolve().parent.parent

# glibc: serve all sizes from the heap and give nothing back, so that later steps pay for no fresh pages
KEEP_PAGES = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "64000000",
}

# torch: ask for pages of 2 MB for large tensors, as the library does for its workspaces
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}


def restart_with(variables):
    """Run this command again with these environment variables, which have to be there from the start of a process."""
    if not variables.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | variables)


def describe(device):
    """Processor, instruction set, device, versions, threads, date, commit and command line: a flat dict of strings."""
    description = {
        "cpu": _cpu_model(),
        "cores": str(_cores()),
        "threads": str(torch.get_num_threads()),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "kernels": info.collect().get("instruction set", "not loaded").split(" (")[0],
        "device": device,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": torch.__version__,
        "densenet_ext": densenet_ext.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "command": _command(),
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        description["device"] = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
        description["cuda"] = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    if "MALLOC_MMAP_MAX_" in os.environ:
        description["malloc"] = "pages are kept between steps"
    if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1":
        description["malloc"] = "large tensors ask for pages of 2 MB"
    return description


def names(known):
    """A type of argparse: names with commas between them, all of them known."""

    def parse(text):
        chosen = tuple(text.split(","))
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
        return chosen

    return parse


def heading(description):
    """The description in three lines."""
    d = description
    where = d["cpu"] if d["device"] == "cpu" else f"{d['device']} ({d['cuda']}), {d['cpu']}"
    lines = [
        f"{where}, {d['cores']} cores, {d['threads']} thread(s), {d['instruction_set']} (our kernels: {d['kernels']})",
        f"torch {d['torch']}, densenet_ext {d['densenet_ext']} ({d['commit']}), {d['system']}, {d['date']}",
        d["command"],
    ]
    if "malloc" in d:
        lines.append(f"malloc: {d['malloc']}")
    return "\n".join(lines)


def _cores():
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu_model():
    try:
        with open("/proc/cpuinfo") as info:
            name = next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return name


def _commit():
    """Short hash of the sources beside the benchmarks, with a + where the tree differs from it.

    Of a copy without its history: what DENSENET_EXT_COMMIT says.
    """
    if "DENSENET_EXT_COMMIT" in os.environ:
        return os.environ["DENSENET_EXT_COMMIT"]
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        # results are what a run writes: they do not make the sources differ
        changes = [*git, "status", "--porcelain", "--", ".", ":!benchmarks/results"]
        changed = subprocess.run(changes, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "no commit"
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _command():
    script = Path(sys.argv[0]).resolve()
    if script.is_relative_to(ROOT):
        script = script.relative_to(ROOT)
    return f"python {shlex.join([str(script), *sys.argv[1:]])}"


def write_json(path, description, rows, **more):
    """{"machine": ..., "rows": [...], ...}"""
    Path(path).write_text(json.dumps({"machine": description, **more, "rows": rows}, indent=1) + "\n")


def write_csv(path, description, rows):
    """One line a row; the machine's columns follow on every line, so that lines of several files can be put together."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *description])
        writer.writeheader()
        writer.writerows(row | description for row in rows)


def table(header, rows):
    """Markdown table with aligned columns; cells are text, all but the first two columns to the right."""
    widths = [max(3, *(len(row[i]) for row in [header, *rows])) for i in range(len(header))]
    return "\n".join([*table_head(header, widths), *(table_row(row, widths) for row in rows)])


def table_head(header, widths):
    """Its first two lines, for a table whose rows come one by one."""
    rule = ["-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return [table_row(header, widths), table_row(rule, widths)]


def table_row(cells, widths):
    cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))]
    return "| " + " | ".join(cells) + " |"
