"""`python -m densenet_ext info` prints which versions are installed and which kernels run: for a bug report."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path
from types import ModuleType

from densenet_ext._load import cuda_status, load_extension
from densenet_ext._version import __version__


def collect() -> dict[str, str]:
    """Return the text of each row by its label. If the library fails to load, the row "library" holds the reason."""
    rows = {"densenet_ext": f"{__version__}, {Path(__file__).parent}"}
    architectures = []  # the CUDA kernels were compiled for these
    try:
        extension = load_extension()
    except ImportError as error:
        rows["library"] = f"NOT LOADED: {error}"
    else:
        rows |= _library_rows(extension)
        if cuda_status() is None:
            architectures = extension.build_info()["cuda_architectures"]
    try:
        import torch
    except ImportError as error:
        rows["torch"] = f"cannot be imported: {error}"
    else:
        rows |= _torch_rows(torch, architectures)
    rows["Python"] = f"{platform.python_version()}, {platform.platform()}"
    return rows


def _library_rows(extension: ModuleType) -> dict[str, str]:
    info = extension.build_info()
    torch = f"torch {info['torch_built_with']} (runs with {info['torch_target']} and newer)"
    rows = {
        "library": extension.__file__,
        "built with": f"{info['compiler']}, {torch}",
        "instruction set": f"{extension.cpu_capability()} (built: {', '.join(info['instruction_sets'])})",
        "CPU threads": str(extension.parallel_threads()),
        "CUDA kernels": cuda_status() or f"{', '.join(info['cuda_architectures'])} (CUDA {info['cuda_version']})",
    }
    if info["sanitizers"]:
        rows["sanitizers"] = info["sanitizers"]
    return rows


def _torch_rows(torch: ModuleType, architectures: list[str]) -> dict[str, str]:
    rows = {"torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}", "CPU": _cpu_name()}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        rows[f"cuda:{index}"] = f"{device.name}, compute capability {device.major}.{device.minor}, {memory}"
        if _is_translated(architectures, device.major, device.minor):
            rows[f"cuda:{index}"] += (
                ", for which the driver translates the kernels when they are first used: this can take a minute, and "
                f"building with TORCH_CUDA_ARCH_LIST={device.major}.{device.minor} spares it"
            )
    return rows


def _is_translated(architectures: list[str], major: int, minor: int) -> bool:
    """Return True if a build for these architectures ("8.0", "9.0+PTX") runs on such a device only by its PTX.

    A binary runs on devices of its own major version, PTX on all later ones.
    """
    numbers = [tuple(map(int, a.removesuffix("+PTX").split("."))) for a in architectures]
    usable = [(a, number) for a, number in zip(architectures, numbers, strict=True) if number <= (major, minor)]
    return any(a.endswith("+PTX") for a, _ in usable) and all(number[0] != major for _, number in usable)


def _cpu_name() -> str:
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def main() -> int:
    """Print the rows. Returns 1, a command's status of failure, if the library fails to load, else 0."""
    rows = collect()
    width = max(map(len, rows))
    for label, value in rows.items():
        print(f"{label:<{width}}  {value}")
    return 1 if rows["library"].startswith("NOT LOADED") else 0


if __name__ == "__main__":
    sys.exit(main())
