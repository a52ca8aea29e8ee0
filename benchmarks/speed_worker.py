"""What a process of speed.py measures: all workloads under one allocator, into a journal.

For each workload: the plain network's numbers; every peer's, from the same weights, data and masks, beside them; its
memory; then all peers that were right, in turn, with the machine's limits between them. A peer that fails is a row that
says how.
"""

import gc
import time
from dataclasses import replace

import agreement
import harness
import roofline
import torch
import workloads
from limits import Limits
from speed_steps import FLOAT32, PEERS, left_out, new_step, peer_of, spec_of

PREPARING = 0.6  # of a workload's time: none is begun later
COMPILING, RUNNING = 1500, 300  # seconds that a cell may take before its process is taken for hanging
COMPARED = ("outputs", "gradients")


def choose_peers(names, workload, dtype):
    """The names that have a place in `workload`, and why others have none."""
    chosen = list(names) + [name for name in FLOAT32 if dtype != "float32" and "fused" in names]
    # where time runs out, it is for compilers
    chosen.sort(key=lambda name: (peer_of(name).runner == "compile", not name.startswith(("fused", "plain"))))
    reasons = {name: left_out(name, workload) for name in chosen}
    return [name for name in chosen if not reasons[name]], {n: r for n, r in reasons.items() if r}


def measure(journal, names, peers, deadline, *, dtype="float32", rounds=5, batch_size=None, tiny=False):
    """All workloads, each with an equal share of the time that is left."""
    chosen = [workloads.find(name, dtype, batch_size, tiny) for name in names]
    journal.fact("cells", sum(2 + len(choose_peers(peers, w, dtype)[0]) for w in chosen))
    for i, workload in enumerate(chosen):
        end = time.monotonic() + max(0.0, deadline - time.monotonic()) / (len(chosen) - i)
        WorkloadRun(journal, workload, peers, end, rounds, tiny).run()
        torch.compiler.reset()
        gc.collect()


class WorkloadRun:
    def __init__(self, journal, workload, peers, end, rounds, tiny=False):
        self.journal, self.workload, self.rounds, self.tiny = journal, workload, rounds, tiny
        self.begun, self.end = time.monotonic(), end
        self.peers, self.left_out = choose_peers(peers, workload, workload.spec.dtype)

    def row(self, which, **values):
        self.journal.row(f"{self.workload.name} {which}", **values)

    def run(self):
        name = self.workload.name
        if f"{name} timing" in self.journal.begun:  # by a process that died here or later
            return
        self.journal.begin(f"{name} reference", allow=RUNNING)
        self.journal.fact(f"left out {name}", self.left_out)
        state = harness.build_model(spec_of(self.workload, PEERS["plain"])).state_dict()
        dtypes = {spec_of(self.workload, peer_of(peer)).dtype for peer in self.peers}
        expected = {dtype: self.plain(dtype, state) for dtype in dtypes}
        wrong = self.examine()
        self.row("reference")
        ready = {}
        for peer in self.peers:
            step = self.prepare(peer, state, expected, wrong.get(peer))
            if step is not None:
                ready[peer] = step
        if ready and self.journal.begin(f"{name} timing", allow=10 * RUNNING):
            self.time(ready)
            self.row("timing")

    def plain(self, dtype, state):
        """The numbers of the plain network's step, to compare those of others with."""
        return new_step(replace(self.workload, spec=replace(self.workload.spec, dtype=dtype)), "plain", state).first

    def examine(self):
        """What is wrong with the gradients of eager peers in float64, by name: on two images, to the last digits."""
        self.float64_errors = {}
        if not self.workload.training:
            return {}
        specs = {}
        for name in self.peers:
            peer = PEERS.get(name)
            if peer is not None and peer.runner == "eager" and name != "plain":
                specs[replace(spec_of(self.workload, peer), dtype="float64")] = name
        wrong, rest = {}, list(specs)
        while rest:
            try:
                for spec, found in agreement.examine(list(rest), COMPARED):
                    rest.remove(spec)
                    if isinstance(found, agreement.DisagreementError):
                        wrong[specs[spec]] = f"wrong: {found}"
                    else:
                        self.float64_errors[specs[spec]] = found
            except Exception as error:  # of the peer that was next; whatever it raises is its result
                wrong[specs[rest.pop(0)]] = first_line(error)
        return wrong

    def prepare(self, name, state, expected, wrong):
        """A peer's step, warm, its numbers compared and its memory measured; None where there is nothing to be timed."""
        key = f"{self.workload.name} {name}"
        if self.journal.before.rows.get(key, {}).get("error"):
            return None
        cell, compiled = self.cell(name), peer_of(name).runner == "compile"
        if wrong is None and time.monotonic() > self.begun + PREPARING * (self.end - self.begun):
            wrong = "out of time"
        self.journal.begin(key, allow=COMPILING if compiled else RUNNING, **cell)
        if wrong is not None:
            return self.row(name, **cell, error=wrong)
        try:
            step = new_step(self.workload, name, state)
            errors = agreement.compare(step.spec, step.first, expected[step.spec.dtype], COMPARED)
            step.first = step.state = None
            memory = harness.measure_memory(step)
            quick = step.timed()
        except agreement.DisagreementError as error:
            return self.row(name, **cell, error=f"wrong: {error}")
        except Exception as error:  # a peer that fails is a result, and compilers raise anything
            return self.row(name, **cell, error=first_line(error))
        found = {
            "errors": errors,
            "float64_errors": self.float64_errors.get(name, {}),
            "warm_up_seconds": step.warm_up_seconds,
            "compiled": compiled,
        }
        figures = {"seconds": sum(quick), "rounds": 0, "peak_bytes": memory.peak_bytes, "kept_bytes": memory.kept_bytes}
        self.row(name, **cell, **found, **figures, workspace_bytes=memory.workspace_bytes)
        return step

    def cell(self, name):
        workload, spec = self.workload, spec_of(self.workload, peer_of(name))
        return {
            "workload": workload.name,
            "title": workload.title,
            "training": workload.training,
            "implementation": name,
            "variant": spec.variant or "BC",
            "dtype": spec.dtype,
            "batch_size": spec.batch_size,
            "size": spec.size,
            "layout": "channels last" if spec.memory_format == torch.channels_last else "contiguous",
        }

    def time(self, ready):
        limits = Limits(self.workload.spec.dtype, self.tiny)
        samples = {name: step.timed for name, step in ready.items()} | limits.samples()
        times = harness.interleave(samples, self.rounds, self.end, seconds=lambda sample: sample())
        rates = limits.rates(times)
        self.journal.fact(f"rates {self.workload.name}", rates)
        for name, step in ready.items():
            self.row(name, **figures(times[name]), **self.against_limits(step.spec, times[name], rates))

    def against_limits(self, spec, times, rates):
        """Operations and bytes of the step, and how many times its time is what the machine needs for them."""
        net, training, seconds = (
            spec.architecture(),
            self.workload.training,
            harness.quantiles(list(map(sum, times)))[0],
        )
        flops = roofline.step_flops(net, spec.batch_size, training)
        e = roofline.STORAGE_BYTES[spec.dtype]
        moved = roofline.step_bytes(net, spec.batch_size, e, training=training)
        return {
            "flops": flops,
            "bytes": moved,
            "of_arithmetic": seconds * rates["flops"] / flops,
            "of_bytes": seconds * rates["bytes"] / moved,
        }


def figures(times):
    """Of the parts of each step: medians, and quantiles of the whole."""
    median, low, high = harness.quantiles([sum(parts) for parts in times])
    row = {"seconds": median, "seconds_20": low, "seconds_80": high, "rounds": len(times)}
    parts = ("forward_seconds", "backward_seconds", "optimizer_seconds")
    medians = [harness.quantiles(part)[0] for part in zip(*times, strict=True)]
    return row | dict(zip(parts, medians, strict=False))


def first_line(error):
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}"
