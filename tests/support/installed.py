"""The installed package, its library, the clone that the tests are in, and programs in processes of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import densenet_ext
from densenet_ext._load import load_extension

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(densenet_ext.__file__).parent
EXTENSION = load_extension()
LIBRARY = Path(EXTENSION.__file__)
SUFFIX = LIBRARY.name.removeprefix("_C")

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="needs a C++ compiler")
needs_cuda_kernels = pytest.mark.skipif(not EXTENSION.build_info()["cuda"], reason="built without CUDA kernels")

# This code lets Python see the densenet_ext in the current directory, and no other.
ALONE = """
import sys
from pathlib import Path
sys.path[:] = [entry for entry in sys.path if not (Path(entry) / "densenet_ext").is_dir()]
sys.path.insert(0, ".")
"""


def run(*command, cwd=None, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)


def run_python(*arguments, **options):
    return run(sys.executable, *arguments, **options)


def write(directory, files):
    """Write these files, {path: text}; a script can be run."""
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if text.startswith("#!") else 0o644)
