"""Registers of the CUDA kernels, read from ptxas's report; a kernel that spills some fails the build."""

import sys

import pytest

PTXAS_REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN12densenet_ext4cuda6spillyIfLi48EEEvPT_' for 'sm_80'
ptxas info    : Function properties for _ZN12densenet_ext4cuda6spillyIfLi48EEEvPT_
    2248 bytes stack frame, 5728 bytes spill stores, 6312 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 2248 bytes cumulative stack size, 360 bytes cmem[0]
ptxas info    : Compile time = 467.362 ms
ptxas info    : Compiling entry function '_ZN12densenet_ext4cuda4fineEPf' for 'sm_90'
ptxas info    : Function properties for _ZN12densenet_ext4cuda4fineEPf
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 1 barriers, 128 bytes smem
"""


@pytest.fixture
def ptxas(build_module):
    return build_module("ptxas")


def test_registers_of_kernels(ptxas, tmp_path):
    spilly, fine = ptxas.parse(PTXAS_REPORT)
    assert (spilly.architecture, spilly.registers, spilly.shared, spilly.stack) == ("sm_80", 32, 0, 2248)
    assert (spilly.spill_stores, spilly.spill_loads) == (5728, 6312)
    assert (fine.architecture, fine.registers, fine.shared, fine.stack) == ("sm_90", 10, 128, 8)
    assert spilly.spills and not fine.spills

    (tmp_path / "a.cu.ptxas").write_text(PTXAS_REPORT)
    lines = ptxas.table([tmp_path / "a.cu.ptxas"]).splitlines()
    assert lines[0].split() == ["source", "kernel", "architecture", "registers", "shared", "stack", "spilled"]
    assert lines[1].split()[2:] == ["sm_90", "10", "128", "8", "0"]
    assert lines[2].split()[-5:] == ["sm_80", "32", "0", "2248", "12040"]


@pytest.mark.parametrize("allowed", [False, True])
def test_spilled_registers_fail_the_build(ptxas, tmp_path, monkeypatch, capsys, allowed):
    monkeypatch.setenv("DENSENET_EXT_ALLOW_SPILLS", str(int(allowed)))
    log, output = tmp_path / "a.cu.ptxas", tmp_path / "a.o"
    output.touch()
    code = f"print({PTXAS_REPORT!r}, 'a.cu(1): warning: something else', sep='')"
    status = ptxas.main(str(log), sys.executable, "-c", code, "-o", str(output))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "a.cu(1): warning: something else"  # and no line of the report
    assert printed[1].startswith("warning: " if allowed else "error: ") and "spilly" in printed[1]
    assert printed[1].endswith(" for sm_80 spills registers: 5728 bytes stored, 6312 bytes loaded")
    assert len(printed) == 2 and status == int(not allowed)
    assert output.exists() == log.exists() == allowed
