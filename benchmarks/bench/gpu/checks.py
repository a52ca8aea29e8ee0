"""The checks that have to pass before a time means anything: the tests, and the kernels under compute-sanitizer.

Each is a process of its own with a time limit; whatever becomes of it, its summary is a dict for the results.
"""

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

# Small shapes, every kernel op, two types: racecheck is the slower tool.
SANITIZED = {
    "memcheck": "test_kernel_equals_twin and {device} and (7x7 or growth-1 or channels-no) and (float32 or bfloat16)",
    "racecheck": "test_kernel_equals_twin and {device} and (7x7 or 33x31) and bfloat16",
}
KERNEL_TESTS = "tests/ops/test_kernels.py"
REHEARSED = "test_kernel_equals_twin and growth-1 and float32"


# ---- the test suite ----------------------------------------------------------------------------------------------------

TESTS_ENVIRONMENT = {"COLUMNS": "400"}  # pytest cuts the lines of its summary
OUTCOMES = {"PASSED": "passed", "FAILED": "failed", "ERROR": "failed", "SKIPPED": "skipped"}


def tests_command(expression, workers=1, paths=()):
    """pytest on what `expression` selects; spread over that many processes where pytest-xdist is installed."""
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "-p", "no:cacheprovider", "--tb=short"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(workers if workers > 1 else 0)]
    if expression:
        command += ["-k", expression]
    return [*command, *paths]


def tests_summary(process):
    """Counts and what failed, from pytest's output: there are some of a run that was ended, too."""
    found = process.summary()
    if found["status"] == 5:
        found["note"] = "no test was selected"
    elif found["status"] not in (0, 1):
        found["output"] = process.tail()
    return found | read_verbose(process.text())


def read_verbose(text):
    """Counts of the lines that `pytest -v` printed, with or without pytest-xdist, and the first line of each failure: from
    the summary, which a killed run lacks."""
    counts, failures = {"passed": 0, "failed": 0, "skipped": 0}, {}
    names = "|".join(OUTCOMES)
    spread, alone = rf"\[gw\d+\] \[\s*\d+%\] ({names}) (\S+::.+)", rf"(\S+::.+) ({names})\b"
    for line in text.splitlines():
        if match := re.match(r"(FAILED|ERROR) (\S+::.+)", line):
            test, _, message = match[2].partition(" - ")
            failures[test] = f"{test}: {message[:200]}"
        elif match := re.match(spread, line) or re.match(alone, line):
            outcome, test = sorted(match.groups(), key=lambda word: word not in OUTCOMES)
            counts[OUTCOMES[outcome]] += 1
            if OUTCOMES[outcome] == "failed":
                failures[test.strip()] = test.strip()
    return counts | {"failures": list(failures.values())[:100]}


# ---- compute-sanitizer -------------------------------------------------------------------------------------------------


def find_sanitizer():
    """The toolkit's compute-sanitizer, or None."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        homes.append(str(Path(nvcc).resolve().parent.parent))
    folders = [str(Path(home, folder)) for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", os.defpath), *folders]))


def sanitizer_command(sanitizer, tool, device="cuda"):
    """The tool over our kernels alone, in a few tests. Its environment is SANITIZER_ENVIRONMENT."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
    options = ["--tool", tool, "--kernel-regex", "kns=densenet_ext", "--print-limit", "20", "--error-exitcode", "99"]
    if tool == "memcheck":
        options += ["--report-api-errors", "no"]  # torch asks for things that fail and goes on
    return [sanitizer, *options, *pytest, "-k", SANITIZED[tool].format(device=device), KERNEL_TESTS]


# Each tensor is an allocation of its own, so that memcheck knows where it ends.
SANITIZER_ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def sanitizer_summary(process):
    """The last words of the tool, what it found, and the last words of the tests under it."""
    text = process.text()
    found = process.summary()
    said = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (.+)$", text, re.M)
    found["said"] = said[-1] if said else None
    numbers = re.findall(r"\d+", found["said"] or "")
    found["errors"] = int(numbers[0]) if numbers else None
    tests = re.findall(r"^=* ?(\d+ (?:passed|failed|skipped|deselected|error).*?)(?: in .*)?$", text, re.M)
    found["tests"] = tests[-1].strip("= ") if tests else None
    if found["errors"] != 0:
        lines = [line for line in text.splitlines() if line.startswith("=========")]
        found["output"] = lines[:40] or process.tail()
    return found
