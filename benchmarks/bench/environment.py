"""The machine and the versions that a measurement is made on and with, and the settings that a process starts with."""

import datetime
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

import densenet_ext
from bench import ROOT
from bench.results import heading
from densenet_ext import info

ALL_THREADS = torch.get_num_threads()

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


def add_device(parser):
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="default: the one there is")


def add_threads(parser):
    parser.add_argument("--threads", type=int, default=ALL_THREADS, help="default: all")


def begin(threads, device="cpu", **more):
    """Set the number of threads, and print and return the description of the machine."""
    torch.set_num_threads(threads)
    description = describe(device) | more
    print(heading(description) + "\n", flush=True)
    return description


def describe(device):
    """Processor, instruction set, device, versions, threads, date, commit and command line: a flat dict of strings."""
    facts, script = info.collect(), Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    description = {
        "cpu": facts["CPU"],
        "cores": str(cores),  # cores that this process may run on
        "threads": str(torch.get_num_threads()),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "kernels": facts.get("instruction set", "not loaded").split(" (")[0],
        "device": device,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": torch.__version__,
        "densenet_ext": densenet_ext.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "command": f"python {shlex.join([str(script), *sys.argv[1:]])}",
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        description["device"] = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
        description["cuda"] = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    if "MALLOC_MMAP_MAX_" in os.environ:
        description["malloc"] = "pages are kept between steps"
    if HUGE_PAGES.items() <= os.environ.items():
        description["malloc"] = "large tensors ask for pages of 2 MB"
    return description


def _commit():
    """Short hash of the sources beside the benchmarks, with a + where the tree differs from it.

    DENSENET_EXT_COMMIT says it for a copy without its history.
    """
    if "DENSENET_EXT_COMMIT" in os.environ:
        return os.environ["DENSENET_EXT_COMMIT"]

    def git(*words):
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        # results are what a run writes: they do not make the sources differ
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "no commit"
