"""The CPU benchmarks, each started as a user would start it on tiny sizes, and the numbers that they write."""

import csv
import io
import json
import os
import runpy
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import densenet_ext

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_kernels  # noqa: E402
import harness  # noqa: E402
import kernels  # noqa: E402
import largest_batch  # noqa: E402
import limits  # noqa: E402
import machine  # noqa: E402
import roofline  # noqa: E402
import speed  # noqa: E402
import speed_report  # noqa: E402
import speed_steps  # noqa: E402
import speed_worker  # noqa: E402
import workloads  # noqa: E402
from compositions import COMPOSITIONS, Composition  # noqa: E402
from harness import Spec  # noqa: E402
from journal import Findings, Journal  # noqa: E402
from peers import Peer  # noqa: E402

EAGER = [name for name in speed_steps.PEERS if "compile" not in name]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script with a command line as Python would, in this process, which has torch loaded already.

    No script may start over: that would be the end of the tests.
    """

    def restarted(*_):
        raise AssertionError("the script replaced the process")

    monkeypatch.setattr(os, "execve", restarted)
    for name, value in machine.HUGE_PAGES.items():
        monkeypatch.setenv(name, value)

    def run(script, *arguments):
        path = ROOT / "benchmarks" / script
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


def run_process(script, *arguments):
    """A script's output, from a process of its own; it takes the package that is tested."""
    path = [str(Path(densenet_ext.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "default.jsonl")


def measure(journal, name, peers, rounds=1, seconds=300.0, dtype="float32"):
    """Rows of the peers in one tiny workload, measured in this process."""
    deadline = time.monotonic() + seconds
    speed_worker.measure(journal, [name], peers, deadline, dtype=dtype, rounds=rounds, tiny=True)
    return {key.split()[1]: row for key, row in Findings(journal.path).rows.items() if "implementation" in row}


# ---- formulas ----------------------------------------------------------------------------------------------------------

NETWORKS = [
    Spec("plain", "", depth=22, growth_rate=8, size=16, batch_size=3),
    Spec("plain", "A+B", depth=16, size=8, batch_size=2),
    Spec("plain", "", blocks=(2, 3, 1, 2), growth_rate=8, size=64, batch_size=2, small_inputs=False, num_classes=10),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spec", NETWORKS, ids=["cifar", "squeeze-and-excitation", "imagenet"])
def test_operations_are_those_that_torch_counts(spec, training):
    model, (images, labels) = harness.build_model(spec).train(training), harness.build_batch(spec)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        loss = F.cross_entropy(model(images), labels)
        if training:
            loss.backward()
    assert roofline.step_flops(spec.architecture(), spec.batch_size, training) == counter.get_total_flops()


def test_bytes_of_inference():
    """Forward's share: each op once, no optimizer, so less than half of training."""
    net = Spec(variant="").architecture()
    assert roofline.step_bytes(net, 64, 4, training=False) < 0.4 * roofline.step_bytes(net, 64, 4)
    ops = [op for op, _ in roofline.step_ops(net, 64, training=False)]
    assert ops.count("bottleneck_forward") == ops.count("conv3x3_forward") == 48
    assert ops.count("append") == 3 and ops.count("transition_forward") == 2 and ops.count("head_forward") == 1


def test_bytes_of_the_stem():
    """DenseNet-121, batch 8, float32: x of 8x64x112x112, read three times and its gradient written, and the pooled maps."""
    net, x = workloads.find("densenet121").spec.architecture(), 8 * 64 * 112**2 * 4
    parts = [roofline.op_bytes(op, s, 4) for op, s in roofline.step_ops(net, 8) if "stem" in op]
    assert parts == [1.25 * x, 2.25 * x]
    assert roofline.stem_bytes(net, 8, 4) == 2 * (x + 8 * 3 * 224**2 * 4)


def test_parameters_are_the_networks():
    """All but the stem, the norms and the classifier's bias."""
    spec = Spec("plain", "", depth=22)
    model = harness.build_model(spec)
    counted = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "conv0" not in name)
    assert roofline.parameters(spec.architecture()) == counted


def test_rates_are_the_best_samples():
    machine = limits.Limits(tiny=True)
    rates = machine.rates({limits.MATRIX: [0.5, 0.25], limits.COPY: [0.125, 1.0]})
    assert rates == {"flops": 2 * machine.size**3 / 0.25, "bytes": 2 * machine.bytes / 0.125}
    assert "AMX" not in limits.describe(rates)
    assert all(sample() > 0 for sample in machine.samples().values())


def test_rates_of_amx_say_how_much_of_it_is_there():
    machine = limits.Limits(tiny=True)
    times = {limits.MATRIX: [0.5], limits.COPY: [0.5], limits.AMX: [0.25, 0.5, 1.0]}
    rates = machine.rates(times)
    assert (rates["amx_flops"], rates["amx_flops_median"]) == (2 * machine.size**3 / 0.25, 2 * machine.size**3 / 0.5)
    text = limits.describe(rates | {"amx_flops": 2e12, "amx_flops_median": 1e12})
    assert text.endswith("bfloat16 product on AMX 2000 GFLOP/s at best, 1000 in the median")
    assert (limits.AMX in machine.samples()) == machine.amx


# ---- peers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar-ab", "densenet121", "bc190-inference"])
def test_eager_peers_are_right_and_timed(journal, name):
    """Each has figures, or a reason to be left out; none is in both or in neither."""
    rows = measure(journal, name, EAGER)
    left_out = Findings(journal.path).facts[f"left out {name}"]
    assert rows.keys() | left_out.keys() == set(EAGER) and not rows.keys() & left_out.keys()
    for peer, row in rows.items():
        if not (peer.startswith("torchvision") and "error" in row and "No module" in row["error"]):
            assert row["rounds"] == 1 and row["peak_bytes"] > 0, row
            assert row["errors"]["outputs"] < 1e-4  # its gradients are float32's, which the side of one rectifier moves
            if row["training"] and peer != "plain":
                assert max(row["float64_errors"][kind] for kind in speed_worker.COMPARED) < 1e-9
                parts = [row[f"{part}_seconds"] for part in ("forward", "backward", "optimizer")]
                assert sum(parts) == pytest.approx(row["seconds"])


def test_limits_in_the_rows(journal):
    """Operations are those that torch counts for the plain network; the ratios are time over time."""
    rows = measure(journal, "cifar", ["plain", "fused"], rounds=2)
    step = speed_steps.new_step(workloads.find("cifar", tiny=True), "plain")
    with FlopCounterMode(display=False) as counter:
        step.forward().backward()
    rates = Findings(journal.path).facts["rates cifar"]
    for row in rows.values():
        assert row["flops"] == counter.get_total_flops()
        assert row["of_arithmetic"] == pytest.approx(row["seconds"] / (row["flops"] / rates["flops"]))
        assert row["of_bytes"] == pytest.approx(row["seconds"] / (row["bytes"] / rates["bytes"]))


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.5 * grad


def wrong_network(self, build=Spec.new_network):
    model = build(self)
    if self.implementation == "checkpoint":
        model.features.transition1.register_forward_hook(lambda module, inputs, output: WrongGradient.apply(output))
    return model


@pytest.mark.parametrize("in_float64", [True, False], ids=["in float64", "in the step"])
def test_wrong_gradients_are_reported(journal, monkeypatch, in_float64):
    """By the check on two images; and where that is left out, as for compiled peers, by the one of the timed step."""
    monkeypatch.setattr(Spec, "new_network", wrong_network)
    if not in_float64:
        monkeypatch.setattr(speed_worker.WorkloadRun, "examine", lambda self: {})
        monkeypatch.setattr(speed_worker.WorkloadRun, "float64_errors", {}, raising=False)
    rows = measure(journal, "cifar", ["plain", "checkpoint", "fused"])
    assert rows["checkpoint"]["error"].startswith("wrong: ") and "gradients differ" in rows["checkpoint"]["error"]
    assert "seconds" not in rows["checkpoint"]
    assert rows["fused"]["rounds"] == rows["plain"]["rounds"] == 1
    found = {"default": Findings(journal.path)}
    text = speed_report.markdown(speed_report.rows_of(found), found, [])
    assert "- checkpoint: wrong: " in text


def test_running_statistics_taken_in_twice_are_a_remark(journal):
    """torchvision's memory_efficient updates them in its recomputation too: its gradients are right all the same."""
    pytest.importorskip("torchvision")
    rows = measure(journal, "cifar", ["plain", "torchvision-efficient", "selective"])
    assert rows["torchvision-efficient"]["errors"]["running statistics"] > 0.01
    assert rows["selective"]["errors"]["running statistics"] < 1e-6
    found = {"default": Findings(journal.path)}
    text = speed_report.markdown(speed_report.rows_of(found), found, [])
    assert "- torchvision-efficient: running statistics differ" in text
    assert "- selective: running statistics differ" not in text


def test_peer_that_fails_has_a_row(journal, monkeypatch):
    """Whatever it raises, and wherever; the others are measured."""

    class Failing(speed_steps.SpeedStep):
        def forward(self):
            raise IndexError("the compiler is out of registers\nand more")

    def new_step(workload, name, state=None, build=speed_steps.new_step):
        if name == "compile":
            peer = Peer("plain")
            return Failing(speed_steps.spec_of(workload, peer), peer, state)
        return build(workload, name, state)

    monkeypatch.setattr(speed_worker, "new_step", new_step)
    rows = measure(journal, "cifar", ["compile", "plain", "fused"])
    assert rows["compile"]["error"] == "IndexError: the compiler is out of registers"
    assert rows["plain"]["rounds"] == rows["fused"]["rounds"] == 1
    found = {"default": Findings(journal.path)}
    text = speed_report.markdown(speed_report.rows_of(found), found, [])
    assert "- compile: IndexError: the compiler is out of registers" in text and "| failed" in text


def test_peer_that_killed_its_process_has_a_row(journal):
    """The next process leaves it out, and prepares the others again, whose steps went with the first."""
    journal.begin("cifar reference")
    journal.row("cifar reference")
    for name in ("plain", "checkpoint"):
        journal.begin(f"cifar {name}", implementation=name, workload="cifar", training=True, layout="contiguous")
        if name == "plain":
            journal.row("cifar plain", implementation="plain", seconds=1.0, rounds=0)
    journal.died("the process stopped")
    rows = measure(Journal(journal.path), "cifar", ["plain", "checkpoint", "fused"])
    assert rows["checkpoint"]["error"] == "the process stopped"
    assert rows["plain"]["rounds"] == rows["fused"]["rounds"] == 1


def test_out_of_time_is_a_row(journal):
    rows = measure(journal, "cifar", ["plain", "fused"], seconds=0.0)
    assert [row["error"] for row in rows.values()] == ["out of time"] * 2


def test_compiled_peers_are_compiled_apart():
    """Dynamo would give one peer the code of another whose backend is equal."""
    compilers = [speed_steps._compiler(peer) for peer in speed_steps.PEERS.values() if peer.runner == "compile"]
    assert len(set(compilers)) == len(compilers)


# ---- the machine -------------------------------------------------------------------------------------------------------


def test_machine_is_described_by_what_this_process_may_use(monkeypatch):
    monkeypatch.setenv("DENSENET_EXT_COMMIT", "0123abc")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: {2, 3, 5}, raising=False)
    described = machine.describe("cpu")
    assert (described["commit"], described["cores"]) == ("0123abc", "3")


# ---- targets -----------------------------------------------------------------------------------------------------------


def row(name, seconds, workload="cifar", **more):
    values = {"allocator": "default", "workload": workload, "implementation": name, "seconds": seconds, "rounds": 1}
    return values | {"peak_bytes": 149e6, "of_arithmetic": 1.6} | more


def test_targets_are_held_against_the_fastest_right_peer():
    rows = [row("plain", 3.0), row("compile", 1.2), row("checkpoint", 0.5, error="wrong: gradients", rounds=0)]
    rows += [row("fused", 0.39), row("fused-kept", 0.375)]
    for r in rows:
        r["faster"] = 1.2 / r["seconds"]
    assert speed_report.fastest_peer(rows, "cifar")["implementation"] == "compile"
    verdicts = {t["name"].split(": ")[1]: t["verdict"] for t in speed_report.targets(rows)}
    assert verdicts == {
        "fused against the fastest peer, compile": "reached",  # 3.1 of 3.0
        "fused-kept against the fastest peer, compile": "missed",  # 3.2 of 3.3
        "fused over the arithmetic's time": "reached",
        "fused peak MB": "reached",
    }
    assert speed_report.targets(rows, capability="avx512") == speed_report.targets(rows)
    restricted = speed_report.targets(rows, capability="avx2")
    assert [t["wanted"] for t in restricted] == [">= 1.5", ""]
    half = speed_report.targets([*rows, row("fused-float32", 0.6)], dtype="bfloat16")
    assert half[-1]["found"] == pytest.approx(0.6 / 0.39) and half[-1]["verdict"] == "reached"


# ---- largest batch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [5, 104, 1999, 2000, 10**6])
@pytest.mark.parametrize("power", [1, 1.6])
def test_largest_is_found_in_few_measurements(budget, power):
    """The last that fits, for bytes that grow with n or faster; 0 where none does."""
    asked = []

    def bytes_of(n):
        asked.append(n)
        return 50 + 7 * n**power

    n, found = largest_batch.largest(bytes_of, budget, most=100_000)
    assert len(asked) == len(set(asked)) == len(found) <= 30
    assert n == 0 or bytes_of(n) <= budget
    assert n == 100_000 or bytes_of(n + 1) > budget


def test_largest_where_memory_ends():
    """As on a GPU: beyond 777 nothing can be measured at all."""
    n, found = largest_batch.largest(lambda n: 1000 * n if n <= 777 else None, 10**9, most=100_000)
    assert n == 777 and found[778] is None


# ---- kernels -----------------------------------------------------------------------------------------------------------


def test_every_op_has_a_composition_and_cases():
    assert COMPOSITIONS.keys() == roofline.FORMULAS.keys()
    for tiny in (True, False):
        assert {op for case in kernels.choose_cases(tiny) for op in case.ops} == set(roofline.FORMULAS)
    assert {(p[3], p[6]) for p in kernels.PAIRS} >= {((7, 7), 12), ((14, 14), 12), ((33, 31), 12), ((32, 32), 5)}


def test_composition_computes_what_the_kernel_does():
    """The 1x1 convolution's, from the same numbers: scale and shift are those of the batch's statistics."""
    size = roofline.Size(2, 5, 4, channels=20, bottleneck=16, growth=4, total=24)
    (weight, bias, conv, *parts), forward = Composition(size, torch.float32, False).bottleneck()
    assert [part.shape[1] for part in parts] == [8, 4, 4, 4]
    x = torch.cat(parts, 1)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    scale = weight * (var + gpu_kernels.EPS).rsqrt()
    rows, moments = torch.empty(size.rows, 16), torch.empty(2, 1, 16)
    shift = bias - scale * mean
    torch.ops.densenet_ext.bottleneck_forward(x, scale[None], shift[None], conv, rows, *moments)
    expected = forward(weight, bias, conv, *parts).permute(0, 2, 3, 1).reshape(size.rows, 16)
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)


# ---- as a user starts them ---------------------------------------------------------------------------------------------


def test_speed(tmp_path):
    """Both allocators, each in a process; Markdown, JSON, CSV, plot; the ratios are of the times beside them."""
    names, lesser = ("plain", "plain-channels-last", "fused", "fused-kept"), []
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        lesser = ["--capability", "avx2"]  # reaches torch and the kernels of the processes that measure
    files = [tmp_path / name for name in ("speed.json", "speed.csv", "speed.png")]
    text = run_process("speed.py", "--quick", "--workloads", "cifar,cifar-inference", "--implementations", ",".join(names),
                       "--threads", 1, "--json", files[0], "--csv", files[1], "--plot", files[2], *lesser)  # fmt: skip
    results = json.loads(files[0].read_text())
    rows = results["rows"]
    assert len(rows) == 2 * (4 + 3)
    for allocator in ("default", "keep-pages"):
        facts = results["facts"][allocator]
        assert ("malloc" in facts["machine"]) == (allocator == "keep-pages")
        assert facts["machine"]["threads"] == "1"
        if lesser:
            assert (facts["machine"]["instruction_set"], facts["machine"]["kernels"]) == ("AVX2", "avx2")
        for workload in ("cifar", "cifar-inference"):
            chosen = [r for r in rows if (r["allocator"], r["workload"]) == (allocator, workload)]
            fastest = min(r["seconds"] for r in chosen if not r["implementation"].startswith("fused"))
            assert [r["faster"] for r in chosen] == pytest.approx([fastest / r["seconds"] for r in chosen])
            assert {r["rounds"] for r in chosen} == {2}
    faster = {(r["allocator"], r["workload"], r["implementation"]): r["faster"] for r in rows}
    against = next(t for t in results["targets"] if t["name"].startswith("cifar, default malloc: fused against"))
    assert against["found"] == faster["default", "cifar", "fused"]
    assert "## Tiny: DenseNet-BC(100, k=12), batch 4 of 16x16, float32, training, default malloc" in text
    assert "left out: fused-kept: differs in what is kept for backward" in text
    with open(files[1], newline="") as file:
        assert [float(line["seconds"]) for line in csv.DictReader(file)] == [r["seconds"] for r in rows]
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_half_type_is_compared_with_float32(journal):
    rows = measure(journal, "cifar", ["plain", "fused"], dtype="bfloat16")
    types = {name: row["dtype"] for name, row in rows.items()}
    assert types == {"plain": "bfloat16", "fused": "bfloat16", "fused-float32": "float32"}
    assert rows["fused"]["bytes"] < rows["fused-float32"]["bytes"]
    assert all(row["rounds"] == 1 for row in rows.values())


def test_largest_batch(run, tmp_path):
    """Fits, the next does not, and both by the harness's own measure."""
    file = tmp_path / "largest.json"
    budget = 20  # more than the packed operands of the fused kernels, a few MB whatever the batch
    run("largest_batch.py", "--budget-mb", budget, "--depth", 10, "--size", 32, "--threads", 1, "--search", "batch",
        "--implementations", "plain,fused", "--device", "cpu", "--json", file, "--csv", tmp_path / "largest.csv")  # fmt: skip
    plain, fused = json.loads(file.read_text())["rows"]
    for r in (plain, fused):
        assert 0 < r["bytes"] <= budget * 1e6 < r["next_bytes"]
    spec = Spec("plain", "", depth=10, size=32, batch_size=plain["largest"])
    assert largest_batch.step_bytes(spec) == pytest.approx(plain["bytes"], rel=0.01)
    assert largest_batch.step_bytes(replace(spec, batch_size=spec.batch_size + 1)) > budget * 1e6
    assert fused["times_plain"] == fused["largest"] / plain["largest"] > 1


def test_deepest_network():
    """n layers a block are depth 6n + 4, and what fits fits."""
    options = ["--search", "depth", "--size", "8", "--batch-size", "2", "--budget-mb", "1", "--device", "cpu"]
    args = largest_batch.parse_arguments([*options, "--implementations", "plain"])
    assert largest_batch.specs_of(args, "depth", "plain")(3).depth == 22
    (found,) = largest_batch.measure(args, largest_batch.choose_budget(args), float("inf"))
    assert found["bytes"] <= 1e6 < found["next_bytes"]
    spec = Spec("plain", "", depth=found["largest"], size=8, batch_size=2)
    assert largest_batch.step_bytes(spec) == pytest.approx(found["bytes"], rel=0.01)


def test_kernels(run, tmp_path):
    file = tmp_path / "kernels.json"
    run("kernels.py", "--quick", "--rounds", 2, "--threads", 1, "--json", file, "--csv", tmp_path / "kernels.csv")
    results = json.loads(file.read_text())
    assert {r["op"] for r in results["rows"]} == set(roofline.FORMULAS)
    for r in results["rows"]:
        assert "error" not in r, r
        assert r["faster"] == pytest.approx(r["composition_seconds"] / r["seconds"])
        assert r["gbytes_per_second"] == pytest.approx(r["bytes"] / r["seconds"] / 1e9)
        limit = max(r["bytes"] / r["copy_rate"], r["flops"] / r["matrix_rate"])
        assert r["of_limit"] == pytest.approx(limit / r["seconds"])
    odd, even = ([r for r in results["rows"] if r["net"] == "odd" and r["height"] == h] for h in (7, 8))
    rates, limits = (
        [sum(r[key] for r in rows) / sum(r["flops"] for r in rows) for rows in (odd, even)]
        for key in ("seconds", "limit_seconds")
    )
    assert results["odd"] == [
        {
            "pair": "7x7 against 8x8",
            "ratio": pytest.approx(rates[0] / rates[1]),
            "ratio_of_limits": pytest.approx(limits[0] / limits[1]),
            "limit": 1.5,
        }
    ]
    assert kernels.REASONS.keys() == roofline.FORMULAS.keys()


@pytest.mark.parametrize("workload", ["cifar-ab", "densenet121"])
def test_phases(run, tmp_path, workload):
    """Every kernel call of the step is in a phase, as often as roofline.py says; the phases are the step."""
    file = tmp_path / "phases.json"
    run("phases.py", "--quick", "--rounds", 2, "--threads", 1, "--workloads", workload, "--json", file)
    results = json.loads(file.read_text())
    for name, facts in zip(("fused", "fused-kept"), results["steps"], strict=True):
        rows = [r for r in results["rows"] if r["implementation"] == name]
        assert sum(r["milliseconds"] for r in rows) == pytest.approx(facts["profiled_milliseconds"], rel=0.5)
        spec = workloads.find(workload, tiny=True).spec
        calls = {}
        for op, size in roofline.step_ops(spec.architecture(), spec.batch_size, name == "fused-kept"):
            calls[op, size.height] = calls.get((op, size.height), 0) + 1
        found = {}
        for r in rows:
            if r["phase"] in roofline.FORMULAS and r["phase"] != "fold_norm":
                found[r["phase"], r["size"]] = found.get((r["phase"], r["size"]), 0) + r["calls"]
                assert r["floor_milliseconds"] > 0
        assert found == calls


def test_batches(run, tmp_path):
    file = tmp_path / "batches.json"
    run("batches.py", "--quick", "--batch-sizes", "2,8,16", "--threads", "1,2", "--rounds", 2, "--json", file)
    rows = {(r["batch_size"], r["threads"]): r for r in json.loads(file.read_text())["rows"]}
    assert rows.keys() == {(size, threads) for size in (2, 8, 16) for threads in (1, 2)}
    least = min(rows[size, 1]["seconds"] / size for size in (8, 16))  # 2 is not among those that shall be flat
    assert rows[2, 1]["over_least"] == pytest.approx(rows[2, 1]["seconds"] / 2 / least)
    assert rows[16, 2]["speedup"] == pytest.approx(rows[16, 1]["seconds"] / rows[16, 2]["seconds"])


def test_memory_prints_rows_as_they_come(monkeypatch, run):
    """The header first, and one variant's rows before the next one is measured."""
    printed = []

    class Output(io.StringIO):
        def write(self, text):
            printed.append(text)
            return super().write(text)

    measured = []
    interleave = harness.interleave

    def watched(steps, *rest):
        measured.append("".join(printed))
        return interleave(steps, *rest)

    monkeypatch.setattr(harness, "interleave", watched)
    monkeypatch.setattr(sys, "stdout", Output())
    tiny = ["--depth", 10, "--batch-size", 2, "--size", 8, "--growth-rate", 4, "--rounds", 1, "--no-resident"]
    run("memory.py", *tiny, "--variants", "vanilla,A+B", "--implementations", "plain,fused", "--threads", 1)
    first, second = measured
    assert "| variant | implementation |" in first and "| vanilla |" not in first
    assert second.count("| vanilla |") == 2 and "| A+B" not in second
    table = [line for line in "".join(printed).splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4 and len({len(line) for line in table}) == 1


def test_speed_says_each_minute_how_far_it_is(tmp_path, capsys):
    class Worker:
        part, journal, polls = "default", tmp_path / "default.jsonl", 0

        def poll(self):
            self.polls += 1
            return self.polls == 2

        def kill(self):
            pass

    journal = Journal(Worker.journal)
    journal.fact("cells", 7)
    journal.begin("cifar fused", 60)
    speed.follow(Worker(), seconds_a_line=0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "default: 1 of 7 cells, 0 min, now cifar fused"
    speed.follow(Worker())
    assert capsys.readouterr().err == ""
