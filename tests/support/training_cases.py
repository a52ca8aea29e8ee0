"""Runs of the training tool that are small enough for tests, and their files."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TIMES = ("images_per_second", "data_wait_percent", "peak_memory_mb", "train_seconds")

# Digits of 8x8 pixels and a network of 3 layers: 39 steps an epoch, 5 ms each.
SMALL = "--dataset digits --image-size 8 --depth 10 --growth-rate 4 --batch-size 32 --threads 1 --device cpu".split()


def train(folder, *arguments):
    """Run train.py in this process, which must end well."""
    import train as script

    assert script.main([*SMALL, "--output", str(folder), *map(str, arguments)]) == 0


def command(script, *arguments):
    return [sys.executable, str(EXAMPLES / script), *map(str, arguments)]


def start(*command, **environment):
    """Run a command as a user would, with its output in pipes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def run(script, *arguments):
    """Run a script of the examples as a user would, which must end well."""
    done = start(*command(script, *arguments))
    assert done.returncode == 0, done.stderr
    return done


def rows(folder):
    """Return metrics.csv without the columns that depend on the clock."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def scalars(folder, tag):
    """Return [(step, value)] as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def temporary_files(folder):
    """Return the files that an unfinished write would leave."""
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


def weights(folder):
    """Return the bytes of the best and of the last weights."""
    last = folder / "checkpoints" / checkpoints(folder)[-1]
    return (folder / "best.safetensors").read_bytes(), (last / "model.safetensors").read_bytes()
