"""Times of interleaved calls, and their quantiles."""

import statistics
import time


def wall_seconds(step):
    """Seconds of one call, which has to wait for the device itself."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def self_timed(sample):
    """The measure of samples that return their seconds."""
    return sample()


def interleave(steps, rounds, deadline=None, progress=None, seconds=wall_seconds):
    """Seconds a step: {key: list of times}. `steps` {key: callable}, `rounds` an int or {key: int}.

    One step of each is run in turn, and every round starts one further, so that what else the machine does falls on all
    alike. After the first round none is begun that would last beyond `deadline` (of time.monotonic). `seconds` measures a
    call.
    """
    rounds = rounds if isinstance(rounds, dict) else dict.fromkeys(steps, rounds)
    times = {key: [] for key in steps}
    longest = 0.0
    for r in range(max(rounds.values())):
        began = time.monotonic()
        if r and deadline is not None and began + longest > deadline:
            break
        keys = [key for key in steps if r < rounds[key]]
        for key in keys[r % len(keys) :] + keys[: r % len(keys)]:
            times[key].append(seconds(steps[key]))
            if progress is not None:
                progress.update()
        longest = max(longest, time.monotonic() - began)
    return times


def quantiles(times):
    """Median, 20 % and 80 % quantile."""
    if len(times) < 2:
        return times[0], times[0], times[0]
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return statistics.median(times), fifths[0], fifths[3]


def quantile_row(times):
    """The columns of a row that say how long a step takes."""
    return dict(zip(("seconds", "seconds_20", "seconds_80"), quantiles(times), strict=True))
