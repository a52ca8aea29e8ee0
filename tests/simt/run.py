"""Runs pytest with the CUDA kernels on the simulated device: tests/simt/run.py [--sanitize] [pytest's arguments].

Tests that have nothing to do with the simulator run too if they are chosen: CPU tensors are its tensors.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

from build import ROOT, build, native


def main(arguments: list[str]) -> int:
    sanitize = "--sanitize" in arguments
    with contextlib.redirect_stdout(sys.stderr):
        library = build(sanitize)
    # torch.compile's cache goes by the graph alone, and the layouts of these ops are others than on a CPU.
    cache = library.parent / "inductor"
    environment = os.environ | {"DENSENET_EXT_LIBRARY": str(library), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    if sanitize:
        environment |= _with_sanitizers()
    command = [sys.executable, "-m", "pytest", *(a for a in arguments if a != "--sanitize")]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def _with_sanitizers() -> dict[str, str]:
    """Python is not instrumented: its leaks are not ours to find, and the interceptors need libstdc++ from the start."""
    compiler = native.find_compiler().command
    libraries = [
        subprocess.run(
            [*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except native.NativeBuildError as error:
        sys.exit(f"error: {error}")
