"""The package of all benchmarks: networks, implementations, steps, measures, and the reports of what was measured."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
MB = 1e6
TITLES = {
    "cifar": "DenseNet-BC(100, k=12)",
    "cifar-ab": "DenseNet-BC(100, k=12) A+B",
    "densenet121": "DenseNet-121",
    "bc190": "DenseNet-BC(190, k=40)",
}

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # silences the profiler's messages; torch reads it while it is loaded
