"""Compares checkpointed and fused networks with plain PyTorch.

float64: no result may differ by more than TOLERANCE of its largest value. If one does, plain PyTorch's noise decides
(noise.py): a result may be as far off as plain's is when every intermediate value is off by NOISE. If a hundredth of
that noise moves the result more than a tenth as far, the result is nothing but noise and is not compared. For example,
norms of equal values (all samples are the same one) blow roundings up until they are as large as everything else.

Lower types: no result may have more than twice plain's error, both against float64. Errors are L2 norms of the whole
result, and one rounding of each value is allowed on top, which no implementation can avoid. Plain's error is the larger
one of those with planar and with channels-last parameters: PyTorch has different kernels for them, which add in
different orders, and in float32 one may be 20 times as far off as the other. Chance still decides many comparisons: a
value falls on the other side of a rectifier in one of the two, or a result of a single value happens to be close. So a
result is wrong only if it is too far off in each of DRAWS draws of the network's values. Two numbers of one normal
distribution differ by more than a factor of two in three of ten cases, and 0.3 ** DRAWS is 4e-9; a real fault is too
far off in all draws. From the second draw on, plain's noise with every value off by NOISE32 is allowed on top: a result
that is 0 except for rounding may happen to be exactly 0 in every draw of plain.
"""

import dataclasses
import math

import torch
from torch import Tensor

from fuzz.draw import Network
from fuzz.noise import Noise
from fuzz.run import Run, run

TOLERANCE = 1e-9
NOISE = 1e-13  # a thousand roundings of float64 or so
NOISE32 = 2**-24  # one rounding of float32, in which lower types are computed
DRAWS = 16


def differences(network: Network) -> list[str]:
    """List the results that 'checkpoint' and 'fused' compute otherwise than plain PyTorch, a line each."""
    torch.set_num_threads(network.threads)
    plain = run(network, False)
    exact = network.dtype == torch.float64
    compare = _other_values_of_float64 if exact else _other_values_of_lower_types
    lines = []
    for efficient in network.implementations:
        other = run(network, efficient, starts=None if exact else plain.starts)
        found = _other_kinds(other, plain) or compare(network, efficient, other, plain)
        lines += [f"{efficient}: {line}" for line in found]
    return lines


def _other_kinds(got: Run, want: Run) -> list[str]:
    """List differences in errors, in the names of results, and in their shapes and dtypes."""
    if want.error is not None or got.error is not None:
        # For a map that is too small PyTorch's average pool raises a RuntimeError, dense_stage a ValueError.
        allowed = isinstance(got.error, type(want.error)) or isinstance(got.error, ValueError)
        if want.error is not None and allowed and "cannot be used" not in str(got.error):
            return []
        return [f"ends with {got.error!r}, plain with {want.error!r}"]
    if got.results.keys() != want.results.keys():
        return [f"has other results than plain: {sorted(got.results.keys() ^ want.results.keys())}"]
    lines = []
    for name in want.results:
        kinds = [
            None if r[name] is None else (tuple(r[name].shape), r[name].dtype) for r in (got.results, want.results)
        ]
        if kinds[0] != kinds[1]:
            lines.append(f"{name} is {kinds[0]}, plain's {kinds[1]}")
    return lines


def _other_values_of_float64(network: Network, efficient: str, got: Run, plain: Run) -> list[str]:
    errors = {name: _largest(got.results[name] - want) for name, want in _values(plain)}
    wrong = {name: want for name, want in _values(plain) if not errors[name] <= TOLERANCE * _largest(want)}
    if not wrong:
        return []
    spreads, smaller = (_spreads(network, level, wrong) for level in (NOISE, NOISE / 100))
    return [
        f"{name} {tuple(want.shape)} is off by {errors[name]:.2g}; its largest value is {_largest(want):.2g}, "
        f"noise moves it by {spreads[name]:.2g}"
        for name, want in wrong.items()
        if not (errors[name] <= spreads[name] or smaller[name] > spreads[name] / 10)
    ]


def _spreads(network: Network, level: float, wanted: dict[str, Tensor]) -> dict[str, float]:
    """The farthest that noise of this level moves each of these results of plain PyTorch, in three runs."""
    noisy = [run(network, False, noise=Noise(level, seed)).results for seed in range(3)]
    return {name: max(_largest(results[name] - want) for results in noisy) for name, want in wanted.items()}


def _other_values_of_lower_types(network: Network, efficient: str, got: Run, plain: Run) -> list[str]:
    suspects = {name: [] for name, _ in _values(plain)}
    for draw in range(DRAWS):
        if draw:
            plain = run(network, False, draw=draw)
            got = run(network, efficient, draw=draw, starts=plain.starts)
        if got.error or plain.error:
            return _other_kinds(got, plain)
        _clear(suspects, network, draw, got, plain)
        if not suspects:
            return []
    return [
        f"{name} is off by, and plain by: " + ", ".join(f"{ours:.2g} {theirs:.2g}" for ours, theirs in errors)
        for name, errors in suspects.items()
    ]


def _clear(suspects: dict[str, list], network: Network, draw: int, got: Run, plain: Run) -> None:
    """Remove the results that are right in this draw from `suspects`; append the errors of the others."""
    options = {"draw": draw, "starts": plain.starts}
    exact = run(network, False, reference=True, **options).results
    other = noisy = None
    for name in list(suspects):
        want, ours = exact[name].double(), _error(got.results[name], exact[name])
        theirs = _error(plain.results[name], exact[name])
        rounding = torch.finfo(plain.results[name].dtype).eps / 2 if exact[name].is_floating_point() else 0
        if not ours <= 2 * theirs + rounding * want.norm().item():
            other = other or run(_in_other_layout(network), False, **options).results
            theirs = max(theirs, _error(other[name], exact[name]))
        allowed = 2 * theirs + rounding * want.norm().item()
        if draw and not ours <= allowed:
            noise = Noise(NOISE32, draw)
            noisy = noisy or run(network, False, reference=True, noise=noise, **options).results
            allowed += _error(noisy[name], exact[name])
        overflown = not all(math.isfinite(error) for error, _ in suspects[name])  # ours, while plain's was finite
        if (ours <= allowed or not math.isfinite(theirs)) and not overflown:
            del suspects[name]
        else:
            suspects[name].append((ours, theirs))


def _in_other_layout(network: Network) -> Network:
    layout = "contiguous" if network.model_layout == "channels last" else "channels last"
    return dataclasses.replace(network, model_layout=layout)


def _error(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact.double()).norm().item()


def _values(plain: Run):
    return ((name, value) for name, value in plain.results.items() if value is not None and value.numel())


def _largest(x: Tensor) -> float:
    return x.abs().max().item()
