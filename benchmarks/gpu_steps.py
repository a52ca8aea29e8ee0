"""Training steps on a GPU: forward, loss, backward and SGD, of every implementation, in several networks and types.

A group is a network, a batch size and a type. In each, gradients of the fused network are compared with the plain one's
first; then every implementation runs a step of full size to warm up and its memory is measured; then all are timed in
turn. A row is written as soon as there is something in it. Kernels are counted by another process at the end: where a
profiler has run once, launches may stay slower.
"""

import math
import time
from dataclasses import dataclass, replace

import harness
import torch
import torch.nn.functional as F
from harness import Spec
from peers import PEERS, GpuStep

# An implementation is not begun later than this many seconds before its group's end; timing takes at most so long.
RESERVE, TIMING = 6, 12
COMPILING = 100  # seconds that a compiled step needs where none was compiled beforehand
LONGEST_SAMPLE = 0.03  # seconds: short steps are timed several at a time
CHECK_BATCH = 8
# An error against float64 may be so many times the plain network's, and so much more; but not larger than the last.
TIMES_PLAIN, ROUNDING, LARGEST_ERROR = 3.0, 1e-3, 0.9


@dataclass(frozen=True)
class Group:
    net: str
    dtype: str
    batch_size: int
    share: float  # of the time for all groups
    implementations: tuple

    @property
    def key(self):
        return f"{self.net} {self.dtype} {self.batch_size}"


# in the order of their importance: time may run out
DENSENET121 = (
    "plain-channels-last",
    "fused-channels-last",
    "compile",
    "plain",
    "fused",
    "checkpoint",
    "fused-graph",
    "fused-kept",
    "checkpoint-channels-last",
)
CIFAR = (
    "plain",
    "fused",
    "plain-channels-last",
    "checkpoint",
    "fused-channels-last",
    "fused-graph",
    "fused-kept",
    "compile",
    "plain-graph",
)
GROUPS = (
    Group("densenet121", "bfloat16", 256, 0.40, DENSENET121),
    Group("cifar", "float32", 64, 0.15, CIFAR),
    Group("cifar", "bfloat16", 64, 0.12, CIFAR),
    Group("cifar", "bfloat16", 256, 0.10, CIFAR),
    Group("densenet121", "float32", 256, 0.17, DENSENET121),
    Group("cifar", "float32", 256, 0.06, CIFAR),
)


def make_spec(group, implementation, device, variant, tiny):
    """The `Spec` of one implementation of a group; of the same kind but tiny for a rehearsal."""
    peer = PEERS[implementation]
    common = {
        "implementation": peer.implementation,
        "dtype": group.dtype,
        "device": device.name,
        "channels_last": peer.channels_last,
        "batch_size": 2 if tiny else group.batch_size,
    }
    if group.net == "cifar":
        size = {"depth": 10, "growth_rate": 4, "size": 8} if tiny else {}
        return Spec(variant=variant, **common, **size)
    # 2x2 pixels at the end: the gradient of a norm over two values is all rounding
    size = {"blocks": (1, 2, 1, 1), "growth_rate": 4, "size": 64} if tiny else {"blocks": (6, 12, 24, 16), "size": 224}
    return Spec(variant="", small_inputs=False, **common, **({"growth_rate": 32, "num_classes": 1000} | size))


def architectures(device, variant, tiny):
    """{net: Architecture} of all networks here."""
    specs = {g.net: make_spec(g, "fused", device, variant, tiny) for g in GROUPS}
    return {net: spec.architecture() for net, spec in specs.items()}


def choose_groups(names=None, tiny=False):
    """All groups, or those whose key contains one of `names`; their shares add up to 1. A rehearsal takes the first."""
    chosen = [g for g in GROUPS if not names or any(name in g.key for name in names)][: 3 if tiny else None]
    whole = sum(g.share for g in chosen)
    return [replace(g, share=g.share / whole) for g in chosen]


def measure(device, journal, deadline, tiny, variant, names=None, implementations=None, compiled=None):
    """All groups, each with its share of the time until `deadline`; what one leaves over goes to the next.

    compiled: what compile_beforehand found, by key; None where it was not run.
    """
    groups, started, share = choose_groups(names, tiny), time.monotonic(), 0.0
    journal.fact("cells", sum(2 + len(g.implementations) for g in groups))
    for group in groups:
        share += group.share
        end = started + (deadline - started) * share
        if implementations:
            group = replace(group, implementations=tuple(i for i in group.implementations if i in implementations))
        GroupRun(device, journal, group, end, tiny, variant, compiled).run()
        device.free()


class GroupRun:
    def __init__(self, device, journal, group, end, tiny, variant, compiled):
        self.device, self.journal, self.group, self.end = device, journal, group, end
        self.tiny, self.variant, self.compiled = tiny, variant, compiled
        self.rounds = 2 if tiny else 15
        self.broken = None  # the error after which this process is to be left to another

    def spec(self, implementation):
        return make_spec(self.group, implementation, self.device, self.variant, self.tiny)

    def row(self, which, **values):
        self.journal.row(f"{self.group.key} {which}", **values)

    def run(self):
        wrong = self.check()
        ready = {}
        for implementation in self.group.implementations:
            if implementation.startswith("fused") and wrong:
                self.row(implementation, **self.cell(implementation), error="gradients disagree: not timed")
                continue
            if time.monotonic() > self.end - RESERVE:
                self.journal.note(f"steps: out of time before {self.group.key} {implementation}")
                break
            if self.broken is not None:
                break
            if self.compiles_too_long(implementation):
                continue
            if self.journal.begin(f"{self.group.key} {implementation}", allow=120, **self.cell(implementation)):
                timed = self.prepare(implementation)
                if timed is not None:
                    ready[implementation] = timed
        if ready and self.journal.begin(f"{self.group.key} timing", allow=60):
            self.time(ready)
            self.journal.row(f"{self.group.key} timing")
        if self.broken is not None:
            raise self.broken

    def cell(self, implementation):
        s = self.spec(implementation)
        return {
            "net": self.group.net,
            "variant": s.variant or "DenseNet-BC",
            "dtype": s.dtype,
            "batch_size": self.group.batch_size,
            "size": s.size,
            "implementation": implementation,
        }

    def compiles_too_long(self, implementation):
        """Whether a compiled step cannot be had in the time left, because none was compiled beforehand."""
        if PEERS[implementation].runner != "compile" or self.compiled is None:
            return False
        found = self.compiled.get(f"compile {self.group.key}", {})
        if "seconds" in found or ("error" not in found and time.monotonic() < self.end - COMPILING):
            return False
        error = found.get("error", "not compiled in time")
        self.row(implementation, **self.cell(implementation), error=error)
        return True

    def check(self):
        """Whether the fused network's gradients are wrong; its time is not worth knowing then."""
        key = f"{self.group.key} agreement"
        if not any(i.startswith("fused") for i in self.group.implementations):
            return False
        if not self.journal.begin(key):  # a process that died was here: where it died, or what it found
            return not self.journal.before.rows.get(key, {}).get("agrees", False)
        self.device.search_algorithms(False)  # for sizes that are never run again
        try:
            found = check_gradients(self.spec)
        except (RuntimeError, ValueError) as error:
            found = {"agrees": False, "error": _first_line(error)}
            if self.device.lost():
                self.journal.row(key, **found)
                raise
        finally:
            self.device.search_algorithms(True)
            self.device.free()
        self.journal.row(key, **found)
        return not found["agrees"]

    def prepare(self, implementation):
        """Warms up and measures what needs no quiet machine; returns what is to be timed, or None where that failed."""
        peer, started = PEERS[implementation], time.monotonic()
        try:
            step = GpuStep(self.spec(implementation), peer.runner, self.device)
            warm_up = time.monotonic() - started
            function, memory = step.run()
            quick = min(self.device.seconds(function) for _ in range(1 if self.tiny else 3))
        except torch.OutOfMemoryError:
            self.row(implementation, **self.cell(implementation), error="out of memory")
            self.device.free()
            return None
        except Exception as error:  # a peer that fails is a result, whatever it raises: compilers raise anything
            self.row(implementation, **self.cell(implementation), error=_first_line(error))
            if self.device.lost():
                raise
            if peer.runner == "graph":
                self.broken = error  # torch's generator may think for ever that it is being captured
            self.device.free()
            return None
        found = {"warm_up_seconds": warm_up, "first_loss": step.first_loss, "seconds": quick, "rounds": 0}
        self.row(implementation, **self.cell(implementation), **found, **memory)
        return Sample(function, 1 if self.tiny else max(1, min(10, math.ceil(LONGEST_SAMPLE / quick))))

    def time(self, ready):
        """Interleaved samples of everything that is ready; what fails is left out and the others begin again."""
        deadline = min(time.monotonic() + TIMING, self.end)
        while ready:
            samples = dict(ready)
            try:
                for sample in samples.values():
                    sample()  # takes back the memory that measuring another one's gave away
                times = harness.interleave(samples, self.rounds, deadline, seconds=self.device.seconds)
            except torch.OutOfMemoryError as error:
                failed = next((i for i, sample in samples.items() if sample.running), None)
                if failed is None:
                    raise
                self.row(failed, error=f"out of memory beside the others: {_first_line(error)}")
                del ready[failed], samples
                self.device.free()
                continue
            except RuntimeError as error:
                self.journal.note(f"steps: {self.group.key} could not be timed: {_first_line(error)}")
                if self.device.lost():
                    raise
                return
            for implementation, found in times.items():
                count = ready[implementation].count
                median, low, high = harness.quantiles([t / count for t in found])
                values = {"seconds": median, "seconds_20": low, "seconds_80": high, "rounds": len(found)}
                self.row(implementation, **values, steps_a_round=count)
            return


def count_kernels(device, journal, deadline, tiny, variant, names=None, implementations=None):
    """Launches in a step of every implementation, and the kernels that take longest in it.

    cuDNN does not search for algorithms here: that takes longer than all the rest.
    """
    device.search_algorithms(False)
    for group in choose_groups(names, tiny):
        for implementation in group.implementations:
            key, peer = f"{group.key} {implementation}", PEERS[implementation]
            if peer.runner == "compile" or (implementations and implementation not in implementations):
                continue
            if time.monotonic() > deadline:
                journal.note(f"profile: out of time before {key}")
                return
            if not journal.begin(key):
                continue
            try:
                step = GpuStep(make_spec(group, implementation, device, variant, tiny), peer.runner, device)
                function, _ = step.run()
                found = device.kernels(function)
            except RuntimeError as error:
                journal.row(key, profile_error=_first_line(error))
                if device.lost():
                    raise
            else:
                journal.row(key, **found)
            step = function = None
            device.free()


class Sample:
    """Several steps in a row, timed as one."""

    def __init__(self, function, count):
        self.function, self.count, self.running = function, count, False

    def __call__(self):
        self.running = True
        for _ in range(self.count):
            self.function()
        self.running = False


def compile_beforehand(device, journal, deadline, tiny, variant, names=None):
    """One compiled step of every group, so that the compiler's results are on disk when steps are measured."""
    for group in choose_groups(names, tiny):
        if "compile" not in group.implementations or time.monotonic() > deadline:
            continue
        key = f"compile {group.key}"
        if not journal.begin(key, allow=240):
            continue
        started = time.monotonic()
        try:
            GpuStep(make_spec(group, "compile", device, variant, tiny), "compile", device)
        except Exception as error:  # the compiler may raise anything; it is met again where steps are measured
            journal.row(key, error=_first_line(error))
            continue
        journal.row(key, seconds=time.monotonic() - started)
        torch.compiler.reset()
        device.free()


def check_gradients(spec_of):
    """Errors of outputs and gradients, norm over norm: {'plain': {...}, 'fused': {...}, ..., 'agrees': ...}.

    Without masks, against the plain network in float64. 'masked' is with them, fused against plain in one type. A deep
    network multiplies rounding, in half precision until a gradient is half noise, so the limit hangs on what the plain
    network's error is; an error of 1 is a gradient that has nothing to do with the true one.
    """
    plain = replace(spec_of("plain"), random=False)
    reference, state = _train_once(replace(plain, dtype="float64"), None)
    found = {}
    for implementation in ("plain", "fused", "fused-kept"):
        spec = replace(spec_of(implementation), random=False, channels_last=False)
        found[implementation] = _errors(_train_once(spec, state)[0], reference)
    masked = (replace(spec_of(implementation), channels_last=False) for implementation in ("fused", "plain"))
    found["masked"] = _errors(*(_train_once(spec, state)[0] for spec in masked))
    limits = {kind: error_limit(error) for kind, error in found["plain"].items()}
    agrees = all(found[i][kind] <= limits[kind] for i in ("fused", "fused-kept", "masked") for kind in limits)
    return found | {"limits": limits, "agrees": agrees}


def error_limit(plain):
    """What the fused network's error may be where the plain one's is `plain`."""
    return max(min(TIMES_PLAIN * plain + ROUNDING, LARGEST_ERROR), 1.2 * plain)


def _train_once(spec, state):
    """Outputs and gradients of one step on a few images, from the weights `state` if given; and the weights."""
    model = harness.build_model(spec)
    if state is not None:
        model.load_state_dict(state)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels = harness.build_batch(spec, batch_size=min(spec.batch_size, CHECK_BATCH))
    torch.manual_seed(2)
    with spec.autocast():
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
    loss.backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters()}
    return {"outputs": {"logits": logits.detach().double()}, "gradients": gradients}, state


def _errors(found, expected):
    """By kind, the norm of the difference over the norm, all tensors together; NaN, which never agrees, if one is NaN."""
    errors = {}
    for kind, tensors in expected.items():
        difference = sum((found[kind][name] - value).square().sum().item() for name, value in tensors.items())
        errors[kind] = math.sqrt(difference / sum(value.square().sum().item() for value in tensors.values()))
    return errors


def _first_line(error):
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}"
