"""`python -m densenet_ext.info`: what it says when all is well, and when something is missing."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from installed import ALONE, EXTENSION, PACKAGE, run_python

from densenet_ext._load import cuda_status


@pytest.fixture
def info():
    return importlib.import_module("densenet_ext.info")


def test_info(tmp_path):
    result = run_python("-m", "densenet_ext.info", cwd=tmp_path, PYTHONPATH=str(PACKAGE.parent))
    assert result.returncode == 0, result.stderr
    rows = dict(line.split(None, 1) for line in result.stdout.splitlines() if not line.startswith("C"))
    assert rows["library"] == EXTENSION.__file__
    assert rows["torch"].startswith(torch.__version__)
    assert EXTENSION.cpu_capability() in rows["instruction"]


def test_info_says_which_cuda_kernels_there_are(info):
    row, built = info.collect()["CUDA kernels"], EXTENSION.build_info()
    assert row == cuda_status() or row == f"{', '.join(built['cuda_architectures'])} (CUDA {built['cuda_version']})"


@pytest.mark.parametrize(
    "architectures, capability, translated",
    [
        (("8.0", "9.0+PTX"), (12, 0), True),
        (("8.0", "9.0+PTX"), (10, 3), True),
        (("8.0", "9.0+PTX"), (8, 9), False),
        (("8.0", "9.0+PTX"), (9, 0), False),
        (("8.0", "12.0"), (12, 1), False),
        (("8.0+PTX", "12.0"), (9, 0), True),
        (("12.0+PTX",), (9, 0), False),  # nothing runs there, and an error says so
        ((), (12, 0), False),  # no kernels
    ],
)
def test_info_says_where_kernels_are_translated(info, monkeypatch, architectures, capability, translated):
    major, minor = capability
    device = SimpleNamespace(name="GPU", major=major, minor=minor, total_memory=1 << 35)
    built = EXTENSION.build_info() | {"cuda_architectures": architectures, "cuda_version": "13.0"}
    monkeypatch.setattr(EXTENSION, "build_info", lambda: built)
    monkeypatch.setattr(info, "cuda_status", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    row = info.collect()["cuda:0"]
    assert row.startswith(f"GPU, compute capability {major}.{minor}, 32 GiB")
    assert (f"TORCH_CUDA_ARCH_LIST={major}.{minor} spares it" in row) == translated == ("first used" in row)


def test_info_without_library(bare_package):
    result = run_python(
        "-c", "import torch" + ALONE + "from densenet_ext import info; sys.exit(info.main())", cwd=bare_package.parent
    )
    assert result.returncode == 1
    assert "NOT LOADED: densenet_ext's library is not built" in result.stdout
    assert torch.__version__ in result.stdout
