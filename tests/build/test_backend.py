"""The build backend and the torch that it builds for."""

from pathlib import Path

import pytest
import torch
from installed import ROOT, run_python


def test_backend_asks_for_torch_only_where_none_fits(build_module, monkeypatch):
    backend = build_module("backend")
    assert backend._torch_requirement() == []
    found = backend.find_torch()
    assert found.directory == Path(torch.__file__).parent and found.version == torch.__version__

    monkeypatch.setattr(backend, "find_torch", lambda: None)
    assert backend._torch_requirement() == ["torch>=2.11"]
    old = type(found)(found.directory, "2.9.1", None)
    monkeypatch.setattr(backend, "find_torch", lambda: old)
    assert backend._torch_requirement() == ["torch>=2.11"]


def test_backend_looks_past_pips_isolation(tmp_path):
    # pip's way: a sitecustomize on PYTHONPATH that takes the site directories off the path
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]"
    )
    code = f"import sys; sys.path.insert(0, {str(ROOT / '_build_backend')!r}); import target as t; "
    code += "print(t._visible_here(), t.find_torch().directory)"
    result = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path), PYTHONNOUSERSITE="1")
    if "site-packages" not in torch.__file__:
        pytest.skip("torch is not where the imitation of pip hides it")
    assert result.stdout.split() == ["None", str(Path(torch.__file__).parent)], result.stderr
