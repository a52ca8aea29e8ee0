"""Peak memory against depth and against growth rate, with the exponent of a least-squares line in log-log axes.

Plain DenseNets keep every layer's normalised copy of all channels in front of it: memory grows with the square of the
depth. The fused stages keep the feature maps themselves: linear.
"""

from math import log
from statistics import linear_regression

from tqdm import tqdm

from bench import MB
from bench.memory_meter import measure_memory
from bench.networks import Spec
from bench.steps import TrainingStep
from bench.tables import paragraphs, table

TITLE = "Peak memory by depth and growth rate"
VALUES = {"depth": (22, 40, 70, 100, 160, 250), "growth_rate": (8, 12, 16, 24, 32, 48)}
IMPLEMENTATIONS = ("plain", "checkpoint", "fused")
DEPTH_OF_GROWTH = 40


def measure(base, growth_rate, implementations):
    """Rows of peaks, and the fit of each sweep. `base`: the fields of `Spec` that do not vary."""
    fixed = {"depth": {"growth_rate": growth_rate}, "growth_rate": {"depth": DEPTH_OF_GROWTH}}
    sweeps = {
        (against, implementation): [Spec(implementation, **{against: v}, **fixed[against], **base) for v in values]
        for against, values in VALUES.items()
        for implementation in implementations
    }
    peaks = {}
    for spec in tqdm(dict.fromkeys(sum(sweeps.values(), [])), desc="peak", disable=None):
        peaks[spec] = measure_memory(TrainingStep(spec)).peak_bytes
    rows, fits = [], []
    for (against, implementation), specs in sweeps.items():
        values, found = VALUES[against], [peaks[spec] for spec in specs]
        fit = {"against": against, "implementation": implementation, "exponent": exponent(values, found)}
        fit["last_step"] = exponent(values[-2:], found[-2:])
        fits.append(fit)
        for spec, peak in zip(specs, found, strict=True):
            sizes = {"depth": spec.depth, "growth_rate": spec.growth_rate, "peak_bytes": peak}
            rows.append(base | {"against": against, "implementation": implementation} | sizes | fit)
    return rows, fits


def exponent(x, y):
    """Slope of the least-squares line through (log x, log y)."""
    return linear_regression([log(v) for v in x], [log(v) for v in y]).slope


def body(results):
    first = results["rows"][0]
    size = f"batch {first['batch_size']}, {first['size']}x{first['size']}, {first['dtype']}"
    return paragraphs(
        f"Peak MB of a training step, {first['variant']}, {size}",
        *(_sweep_table(results, against) for against in VALUES),
        "exponent: of a least-squares line through all points in log-log axes; last two: between the last two points.",
    )


def _sweep_table(results, against):
    cells = []
    for fit in (fit for fit in results["fits"] if fit["against"] == against):
        rows = [row for row in results["rows"] if fit.items() <= row.items()]
        peaks = [f"{row['peak_bytes'] / MB:.0f}" for row in rows]
        cells.append([against, fit["implementation"], *peaks, f"{fit['exponent']:.2f}", f"{fit['last_step']:.2f}"])
    fixed = f"k = {rows[0]['growth_rate']}" if against == "depth" else f"depth {rows[0]['depth']}"
    return table([fixed, "implementation", *(str(row[against]) for row in rows), "exponent", "last two"], cells)
