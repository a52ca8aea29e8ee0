"""kernels.py and phases.py: ratios are of the figures beside them, and every kernel call of a step is in a phase."""

import pytest
import torch
from bench.compositions import COMPOSITIONS, Composition
from bench.kernel_arguments import EPS
from bench.roofline import FORMULAS, Size, step_ops
from bench.workloads import find
from kernels import REASONS


def test_every_op_has_a_composition_and_a_reason():
    assert COMPOSITIONS.keys() == REASONS.keys() == FORMULAS.keys()


def test_composition_computes_what_the_kernel_does():
    """The 1x1 convolution's, from equal numbers: scale and shift are those of the batch's statistics."""
    size = Size(2, 5, 4, channels=20, bottleneck=16, growth=4, total=24)
    (weight, bias, conv, *parts), forward = Composition(size, torch.float32, False).bottleneck()
    assert [part.shape[1] for part in parts] == [8, 4, 4, 4]
    x = torch.cat(parts, 1)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    scale = weight * (var + EPS).rsqrt()
    rows, moments = torch.empty(size.rows, 16), torch.empty(2, 1, 16)
    shift = bias - scale * mean
    torch.ops.densenet_ext.bottleneck_forward(x, scale[None], shift[None], conv, rows, *moments)
    expected = forward(weight, bias, conv, *parts).permute(0, 2, 3, 1).reshape(size.rows, 16)
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)


def test_kernels(run, tmp_path):
    _, found = run("kernels.py", "--quick", "--rounds", 2, "--threads", 1, "--csv", tmp_path / "kernels.csv")
    assert {r["op"] for r in found["rows"]} == set(FORMULAS)
    assert (tmp_path / "kernels.csv").read_text().count("\n") == 1 + len(found["rows"])
    for r in found["rows"]:
        assert "error" not in r, r
        assert r["faster"] == pytest.approx(r["composition_seconds"] / r["seconds"])
        assert r["gbytes_per_second"] == pytest.approx(r["bytes"] / r["seconds"] / 1e9)
        limit = max(r["bytes"] / r["copy_rate"], r["flops"] / r["matrix_rate"])
        assert r["of_limit"] == pytest.approx(limit / r["seconds"])
    odd, even = ([r for r in found["rows"] if r["net"] == "odd" and r["height"] == h] for h in (7, 8))
    rates, limits = (
        [sum(r[key] for r in rows) / sum(r["flops"] for r in rows) for rows in (odd, even)]
        for key in ("seconds", "limit_seconds")
    )
    ratios = {"ratio": pytest.approx(rates[0] / rates[1]), "ratio_of_limits": pytest.approx(limits[0] / limits[1])}
    assert found["odd"] == [{"pair": "7x7 against 8x8", **ratios, "limit": 1.5}]


@pytest.mark.parametrize("workload", ["cifar-ab", "densenet121"])
def test_phases(run, workload):
    """Every kernel call of the step is in a phase, as often as roofline.py says; the phases are the step."""
    _, results = run("phases.py", "--quick", "--rounds", 2, "--threads", 1, "--workloads", workload)
    for name, facts in zip(("fused", "fused-kept"), results["steps"], strict=True):
        rows = [r for r in results["rows"] if r["implementation"] == name]
        assert sum(r["milliseconds"] for r in rows) == pytest.approx(facts["profiled_milliseconds"], rel=0.5)
        spec = find(workload, tiny=True).spec
        calls, found = {}, {}
        for op, size in step_ops(spec, name == "fused-kept"):
            calls[op, size.height] = calls.get((op, size.height), 0) + 1
        for r in rows:
            if r["phase"] in FORMULAS and r["phase"] != "fold_norm":
                found[r["phase"], r["size"]] = found.get((r["phase"], r["size"]), 0) + r["calls"]
                assert r["floor_milliseconds"] > 0
        assert found == calls
