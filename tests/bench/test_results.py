"""Results: the description of a machine, and the stored tables, each of which is made from its JSON file."""

import json

import pytest
from bench import BENCHMARKS, environment, results

STORED = sorted((BENCHMARKS / "results").glob("*/*.json"))


def test_machine_is_described_by_what_this_process_may_use(monkeypatch):
    monkeypatch.setenv("DENSENET_EXT_COMMIT", "0123abc")
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda process: {2, 3, 5}, raising=False)
    described = environment.describe("cpu")
    assert (described["commit"], described["cores"]) == ("0123abc", "3")


@pytest.mark.parametrize("path", STORED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_stored_table_is_made_from_its_results(path):
    found = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == results.markdown(found)
    assert {"torch", "densenet_ext", "commit", "date", "command"} <= found["machine"].keys()
    assert path.stem.startswith({"scaling": "memory-scaling"}.get(found["benchmark"], found["benchmark"]))
