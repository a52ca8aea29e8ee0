"""Runs pytest with the CUDA kernels on the simulated device: tests/simt/run.py [--sanitize] [pytest's arguments].

Every test can be chosen: the simulated device serves CPU tensors.
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
    # torch.compile caches by the graph alone, and these ops return other layouts than on a CPU.
    cache = library.parent / "inductor"
    environment = os.environ | {"DENSENET_EXT_LIBRARY": str(library), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    if sanitize:
        environment |= _with_sanitizers()
    command = [sys.executable, "-m", "pytest", *(a for a in arguments if a != "--sanitize")]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def _with_sanitizers() -> dict[str, str]:
    """Environment for a Python that is not instrumented: no search for leaks, and libstdc++ loaded from the start."""
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
