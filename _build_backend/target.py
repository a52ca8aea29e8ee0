"""Finds the torch that densenet_ext is built against, without importing it.

pip builds in an isolated environment, which hides the packages of the environment that it installs into. Yet a build
must use exactly the torch found there: a second one takes gigabytes, and may be for another version of CUDA.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

OLDEST_TORCH = (2, 11)  # csrc/ is written against this version's stable ABI; every later one can load it


@dataclass(frozen=True)
class Torch:
    directory: Path
    version: str
    cuda: str | None

    @property
    def is_new_enough(self) -> bool:
        return tuple(int(part) for part in re.findall(r"\d+", self.version)[:2]) >= OLDEST_TORCH


def find_torch() -> Torch | None:
    """Return the torch of this environment, or else of the environment that pip installs into, or else None."""
    directory = _visible_here() or _visible_to_plain_python()
    if directory is None:
        return None
    facts = runpy.run_path(str(directory / "version.py"))
    return Torch(directory, str(facts["__version__"]), facts.get("cuda"))


def _visible_here() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _visible_to_plain_python() -> Path | None:
    # pip isolates through these two variables alone; sys.executable is still the target environment's Python.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    code = "import importlib.util as u; spec = u.find_spec('torch'); print(spec.origin if spec else '')"
    command = [sys.executable, "-c", code]
    # `-c` puts the current directory on the path, so start in a folder that holds no source tree of torch.
    elsewhere = os.path.dirname(sys.executable)
    found = subprocess.run(command, env=environment, cwd=elsewhere, capture_output=True, text=True)
    origin = found.stdout.strip()
    return Path(origin).parent if found.returncode == 0 and origin else None
