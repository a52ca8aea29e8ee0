"""Each instruction set of this machine gives the same numbers, in its own process; and torch's threads are used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from densenet_ext import _C

BUILT = _C.build_info()["instruction_sets"]
AVAILABLE = BUILT[: BUILT.index(_C.cpu_capability()) + 1]  # the lowest to the one in use

CORE = """
import sys
sys.path[:0] = {paths}
import torch
from kernel_cases import Problem, Shape
from test_kernels import OPS, check, fits, problems
from densenet_ext import DenseNetBC, _C
assert _C.cpu_capability() == {capability!r}, _C.cpu_capability()
shapes = [
    Shape("", samples=3, height=17, width=19, channels=21, bottleneck=20, growth=5),
    Shape("", channels=33, bottleneck=48, growth=12),
    Shape("in two chunks of channels", height=5, width=7, channels=101, bottleneck=48, growth=12),
    Shape("in blocks of rows, the last of them odd", height=57, width=40, channels=5, bottleneck=48, growth=7),
]
count = 0
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for op, variants in OPS.items():
        for shape in shapes:
            for options in variants:
                for problem in problems(shape, dtype, op):
                    check(op, getattr(problem, op)(**options), dtype)
                    count += 1
print("checked", count)
"""


def run(code, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("capability", AVAILABLE)
def test_kernels_of_every_instruction_set_equal_their_twins(capability):
    paths = [str(Path(__file__).parents[1] / "ops"), *sys.path]
    result = run(CORE.format(paths=paths, capability=capability), DENSENET_EXT_CPU_CAPABILITY=capability)
    assert result.returncode == 0, result.stderr[-3000:]
    assert int(result.stdout.split()[-1]) > 200


@pytest.mark.repetitions(1)
@pytest.mark.parametrize("value", ["sse9", "AVX2 ", "avx1024"])
def test_unknown_instruction_set_is_an_error_that_says_what_there_is(value):
    code = f"import sys; sys.path[:0] = {sys.path}; from densenet_ext import DenseNetBC"
    result = run(code, DENSENET_EXT_CPU_CAPABILITY=value)
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert "DENSENET_EXT_CPU_CAPABILITY" in message and value in message and "baseline" in message


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_threads_really_run():
    """Elsewhere torch's parallel loops are header templates, which run on one thread if a build forgets a flag."""
    torch.set_num_threads(2)
    assert _C.parallel_threads() == 2
    torch.set_num_threads(1)
    assert _C.parallel_threads() == 1
