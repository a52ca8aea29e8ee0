"""Rates that a machine reaches, measured beside the steps that are held against them: they limit every time.

Arithmetic is a large matrix product of torch, in the type that is measured. Memory is a copy of tensors that no cache
holds, bytes read and bytes written. On a CPU the best of all calls counts, since a limit is what can be reached.

On a shared machine the AMX unit may lose more to others than the rest of a core does. So where the kernels use it, a product
on it is measured too, its best and its median: no floor, but to be compared with those of other runs.
"""

import statistics
from functools import partial

import torch

from bench.timing import wall_seconds
from densenet_ext import info

MATRIX = "limit: matrix product"
AMX = "limit: matrix product on AMX"
COPY = "limit: copy"
REPEATS = 3  # calls of which one sample is the best


class RateSamples:
    """`samples` for timing.interleave; `rates` makes of their times operations and bytes a second."""

    def __init__(self, dtype="float32", tiny=False):
        size, self.bytes = (128, 1 << 20) if tiny else (2048, 1 << 28)
        self.flops = 2 * size**3
        a, b = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
        source, target = torch.ones(self.bytes // 4), torch.ones(self.bytes // 4)
        self.samples = {
            MATRIX: partial(_best, torch.mm, a, b, out=torch.empty_like(a)),
            COPY: partial(_best, target.copy_, source),
        }
        if info.collect().get("instruction set", "").startswith("amx"):
            a, b = (t.to(torch.bfloat16) for t in (a, b))
            self.samples[AMX] = partial(_best, torch.mm, a, b, out=torch.empty_like(a))
        for sample in self.samples.values():
            sample()  # threads started, pages touched

    def rates(self, times):
        rates = {"flops": self.flops / min(times[MATRIX]), "bytes": 2 * self.bytes / min(times[COPY])}
        if AMX in times:
            best, median = min(times[AMX]), statistics.median(times[AMX])
            rates |= {"amx_flops": self.flops / best, "amx_flops_median": self.flops / median}
        return rates


def _best(function, *arguments, **options):
    return min(wall_seconds(partial(function, *arguments, **options)) for _ in range(REPEATS))


def gpu_ceilings(device):
    """Rates of a GPU, medians: bytes a second of a copy, operations a second of a matrix product in each type."""

    def median(function):
        for _ in range(3):
            function()
        return statistics.median(device.seconds(function) for _ in range(10))

    def copy():
        source = torch.randn(device.copy_bytes // 4, device=device.name)
        target = torch.empty_like(source)
        return 2 * device.copy_bytes / median(lambda: target.copy_(source))

    def product(dtype):
        n = device.product_size
        a, b = (torch.randn(n, n, device=device.name, dtype=dtype) for _ in range(2))
        return 2 * n**3 / median(lambda: a @ b)

    products = {dtype: product(getattr(torch, dtype)) for dtype in ("bfloat16", "float32")}
    found = {"bandwidth": copy(), "products": products}
    device.free()
    return found
