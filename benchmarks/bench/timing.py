"""Times of interleaved calls, and their quantiles."""

import statistics
import time


def wall_seconds(function):
    """Seconds of one call, which has to wait for the device itself."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleave(samples, rounds, deadline=None):
    """Lists of times by key. `samples`: {key: function that measures something once and returns its seconds}.

    One sample of each is taken in turn, and every round starts one further, so that what else the machine does falls on all
    alike. After the first round none is begun that would last beyond `deadline` (of time.monotonic).
    """
    keys, times, longest = list(samples), {key: [] for key in samples}, 0.0
    for r in range(rounds):
        began = time.monotonic()
        if r and deadline is not None and began + longest > deadline:
            break
        first = r % len(keys)
        for key in keys[first:] + keys[:first]:
            times[key].append(samples[key]())
        longest = max(longest, time.monotonic() - began)
    return times


def quantile_row(times):
    """The columns of a row that say how long a step takes: median, 20 % and 80 % quantile."""
    fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
    return {"seconds": statistics.median(times), "seconds_20": fifths[0], "seconds_80": fifths[3]}
