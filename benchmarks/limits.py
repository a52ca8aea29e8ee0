"""What this machine reaches now, measured between the steps that are held against it: the limits under a time.

Arithmetic: a large matrix product of torch, in the type that is measured. Memory: a copy of tensors that no cache holds,
bytes read and bytes written. The best of all calls counts, since a limit is what can be reached.

On a shared machine the AMX unit may lose more to others than the rest of a core does. So where the kernels use it, a product
on it is measured too, its best and its median: no floor, but to be compared with those of other runs.
"""

import statistics
import time

import torch
from roofline import floor_seconds

from densenet_ext import info

MATRIX = "limit: matrix product"
AMX = "limit: matrix product on AMX"
COPY = "limit: copy"
REPEATS = 3  # calls of which one sample is the best


class Limits:
    """Two samples for harness.interleave; `rates` makes of their times operations and bytes a second."""

    def __init__(self, dtype="float32", tiny=False):
        dtype = getattr(torch, dtype)
        self.size, self.bytes = (128, 1 << 20) if tiny else (2048, 1 << 28)
        self.a, self.b = (torch.randn(self.size, self.size).to(dtype) for _ in range(2))
        self.product = torch.empty_like(self.a)
        self.source, self.target = torch.ones(self.bytes // 4), torch.ones(self.bytes // 4)
        self.amx = info.collect().get("instruction set", "").startswith("amx")
        self.halves = [t.to(torch.bfloat16) for t in (self.a, self.b, self.product)] if self.amx else []
        for sample in self.samples().values():
            sample()  # threads started, pages touched

    def samples(self):
        samples = {
            MATRIX: lambda: _best(lambda: torch.mm(self.a, self.b, out=self.product)),
            COPY: lambda: _best(lambda: self.target.copy_(self.source)),
        }
        if self.amx:
            a, b, product = self.halves
            samples[AMX] = lambda: _best(lambda: torch.mm(a, b, out=product))
        return samples

    def rates(self, times):
        flops = 2 * self.size**3
        rates = {"flops": flops / min(times[MATRIX]), "bytes": 2 * self.bytes / min(times[COPY])}
        if AMX in times:
            rates |= {"amx_flops": flops / min(times[AMX]), "amx_flops_median": flops / statistics.median(times[AMX])}
        return rates


def _best(function):
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def floor(moved, flops, rates):
    """Seconds that no version takes less than, at these rates."""
    return floor_seconds(moved, flops, rates["bytes"], rates["flops"])


def describe(rates):
    text = f"matrix product {rates['flops'] / 1e9:.0f} GFLOP/s, copy {rates['bytes'] / 1e9:.1f} GB/s"
    if "amx_flops" in rates:
        best, median = (rates[key] / 1e9 for key in ("amx_flops", "amx_flops_median"))
        text += f"; bfloat16 product on AMX {best:.0f} GFLOP/s at best, {median:.0f} in the median"
    return text
