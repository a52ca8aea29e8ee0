"""The memory that torch allocates on the CPU, in the order of the events."""

from torch.profiler import ProfilerActivity, profile


def allocations(run):
    """Bytes that each allocation takes, and each release gives back (less than 0), while `run` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
