"""memory.py and largest_batch.py: rows as they come, and the largest step that fits."""

from dataclasses import replace

import largest_batch
import pytest
from bench import timing
from bench.networks import Spec


def test_memory_prints_rows_as_they_come(monkeypatch, run, capsys):
    """The header first, and one variant's rows while the next one is not yet measured."""
    printed, interleave = [], timing.interleave

    def watched(samples, *rest):
        printed.append(capsys.readouterr().out)
        return interleave(samples, *rest)

    monkeypatch.setattr(timing, "interleave", watched)
    tiny = ["--depth", 10, "--batch-size", 2, "--size", 8, "--growth-rate", 4, "--rounds", 1, "--no-resident"]
    end, _ = run("memory.py", *tiny, "--variants", "vanilla,A+B", "--implementations", "plain,fused", "--threads", 1)
    first, second = printed
    assert "| variant | implementation |" in first and "| vanilla |" not in first
    assert second.count("| vanilla |") == 2 and "| A+B" not in second
    table = [line for line in (first + second + end).splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4 and len({len(line) for line in table}) == 1


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
    """Beyond 777 nothing can be measured at all, as on a GPU."""
    n, found = largest_batch.largest(lambda n: 1000 * n if n <= 777 else None, 10**9, most=100_000)
    assert n == 777 and found[778] is None


def test_largest_batch(run):
    """It fits, the next does not, and both by the benchmarks' measure."""
    budget = 20  # more than the packed operands of the fused kernels, a few MB whatever the batch
    _, found = run("largest_batch.py", "--budget-mb", budget, "--depth", 10, "--size", 32, "--threads", 1, "--search",
                   "batch", "--implementations", "plain,fused", "--device", "cpu")  # fmt: skip
    plain, fused = found["rows"]
    assert abs(fused["predicted"] - fused["largest"]) <= 0.02 * fused["largest"] + 1
    for r in (plain, fused):
        assert 0 < r["bytes"] <= budget * 1e6 < r["next_bytes"]
    spec = Spec("plain", "", depth=10, size=32, batch_size=plain["largest"])
    assert largest_batch.step_bytes(spec) == pytest.approx(plain["bytes"], rel=0.01)
    assert largest_batch.step_bytes(replace(spec, batch_size=spec.batch_size + 1)) > budget * 1e6
    assert fused["times_plain"] == fused["largest"] / plain["largest"] > 1


def test_deepest_network(run):
    """n layers a block are depth 6n + 4, and what fits fits."""
    _, results = run("largest_batch.py", "--search", "depth", "--size", 8, "--batch-size", 2, "--budget-mb", 1, "--device",
                     "cpu", "--threads", 1, "--implementations", "plain")  # fmt: skip
    (found,) = results["rows"]
    assert largest_batch.spec_function(results["settings"], "depth", "plain")(3).depth == 22
    assert found["bytes"] <= 1e6 < found["next_bytes"]
    spec = Spec("plain", "", depth=found["largest"], size=8, batch_size=2)
    assert largest_batch.step_bytes(spec) == pytest.approx(found["bytes"], rel=0.01)
