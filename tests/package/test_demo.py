"""`python -m densenet_ext` lists its commands, and the demo measures."""

import re
from pathlib import Path

import pytest
from installed import PACKAGE, run_python

import densenet_ext
from densenet_ext import __main__, info

ROW = re.compile(r"(\w+) +([\d.]+) MB +(\d+) % +([\d.]+) s +(\d+) %")


def run(*arguments):
    return run_python("-m", "densenet_ext", *arguments, PYTHONPATH=str(PACKAGE.parent))


def test_without_a_command_the_commands_are_listed():
    done = run()
    assert done.returncode == 0
    assert "demo" in done.stdout and "info" in done.stdout


def test_info_prints_what_its_module_prints(capsys):
    printed = []
    for print_info in (lambda: __main__.main(["info"]), info.main):
        assert print_info() == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and densenet_ext.__version__ in printed[0]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell the peak")
def test_demo_measures_three_implementations():
    """The peaks, which are tens of megabytes apart, are in the README's order; times are positive."""
    done = run("demo", "--depth", "22", "--batch-size", "16", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "depth 22" in done.stdout and "16 images" in done.stdout
    rows = {row[1]: [float(value) for value in row.groups()[1:]] for row in ROW.finditer(done.stdout)}
    assert list(rows) == ["plain", "checkpoint", "fused"]
    peaks = {name: row[0] for name, row in rows.items()}
    assert 0 < peaks["fused"] < 0.7 * min(peaks["plain"], peaks["checkpoint"])
    assert rows["plain"][1] == rows["plain"][3] == 100
    for peak, percent, seconds, _ in rows.values():
        assert percent == pytest.approx(100 * peak / peaks["plain"], abs=1)
        assert seconds > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--depth", "11"], "depth is 11; it must be 6"),
        (["--batch-size", "0"], "batch_size is 0; it must be a positive"),
    ],
)
def test_demo_says_what_is_wrong_with_an_option(options, message):
    with pytest.raises(SystemExit, match=message):
        __main__.main(["demo", *options])
