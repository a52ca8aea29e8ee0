"""Peak memory of training steps."""

import sys
from contextlib import suppress
from pathlib import Path

import torch


class PeakMemory:
    """The most memory that was in use since `reset`, in MB = 1e6 bytes.

    On a GPU: what PyTorch's allocator had handed out, data and parameters included. On a CPU: growth of the resident set
    over its size when this object was created, which owes nothing to any allocator.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._start = 0.0 if device.type == "cuda" else _resident("VmRSS")
        self.reset()

    def reset(self) -> None:
        """Forget the peak so far. Without /proc the peak of a CPU process cannot be forgotten."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM

    def read(self) -> float:
        """Return the peak in MB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        return max(0.0, _resident("VmHWM") - self._start)


def _resident(field: str) -> float:
    """Return VmRSS or VmHWM in MB, or ru_maxrss where there is no /proc: a child inherits ru_maxrss from its parent."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")) / 1e6
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
