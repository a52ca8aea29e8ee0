"""A command with a time limit, in a group of its own."""

import os
import signal
import subprocess
import time
from pathlib import Path

from bench import ROOT

GRACE = 10  # seconds between asking a process to end and ending it


class Process:
    """A command whose output goes to a file; it is ended when its time is over."""

    def __init__(self, command, log, limit, environment=None):
        self.log, self.started, self.limit = Path(log), time.monotonic(), limit
        self.interrupted = None
        with open(self.log, "w") as output:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | (environment or {}),
                start_new_session=True,
            )

    @property
    def status(self):
        return self.process.returncode

    def poll(self):
        """True if it has ended; called again and again, it sees to the time limit."""
        if self.process.poll() is not None:
            return True
        instant = time.monotonic()
        if self.interrupted is None and instant > self.started + self.limit:
            self.interrupted = instant
            self.process.send_signal(signal.SIGINT)  # the signal of Ctrl-C, so that pytest still writes its summary
        elif self.interrupted is not None and instant > self.interrupted + GRACE:
            self.kill()
            return True
        return False

    def kill(self):
        """End it and what it started, if it has not ended."""
        if self.process.poll() is None:
            self.interrupted = self.interrupted or time.monotonic()
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def wait(self):
        try:
            while not self.poll():
                time.sleep(0.2)
        finally:
            self.kill()
        return self

    def summary(self):
        """Exit status, seconds until this call, and whether the time was over."""
        seconds = round(time.monotonic() - self.started, 1)
        return {"status": self.status, "seconds": seconds, "out_of_time": self.interrupted is not None}

    def text(self):
        return self.log.read_text(errors="replace")

    def tail(self, lines=15):
        return self.text().strip().splitlines()[-lines:]
