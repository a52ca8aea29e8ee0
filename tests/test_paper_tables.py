"""paper_tables.py: runs variants, and writes the paper's tables from what they left."""

import contextlib
import csv
import io
import json
from pathlib import Path

import pytest

for name in ("sklearn", "safetensors", "tensorboard", "yaml"):
    pytest.importorskip(name)

import paper_tables  # noqa: E402
from training import options  # noqa: E402

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = "--depth 10 --growth-rate 4 --image-size 8 --epochs 2 --limit-steps 4 --threads 1 --device cpu".split()


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What a call leaves that runs one variant."""
    folder = tmp_path_factory.mktemp("paper")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        paper_tables.main(["--variants", "A+B+C", "--output", str(folder), *TINY])
    assert (folder / "tables.md").read_text() in said.getvalue()
    return folder


def test_table_is_the_summary(output):
    found = json.loads((output / "digits-A+B+C" / "summary.json").read_text())
    assert (found["variant"], found["efficient"], found["steps"]) == ("A+B+C", "fused", 4)
    with open(output / "digits.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    for name in ("test_accuracy", "peak_memory_mb", "train_seconds"):
        assert float(row[name]) == found[name]
    assert f"| A+B+C | {found['test_accuracy']:.2f} | – |" in (output / "tables.md").read_text()
    for figure in ("digits-loss.png", "digits-accuracy.png"):
        assert (output / figure).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_papers_figures_stand_beside_ours(output, tmp_path, capsys):
    """Of a run that is called one on CIFAR-100."""
    for variant in ("vanilla", "A+B+C"):
        folder = tmp_path / f"cifar100-{variant}"
        folder.mkdir(parents=True)
        for name in ("metrics.csv", "environment.json"):
            (folder / name).write_bytes((output / "digits-A+B+C" / name).read_bytes())
        found = json.loads((output / "digits-A+B+C" / "summary.json").read_text())
        found |= {"test_accuracy": 77.125, "peak_memory_mb": 155.4, "train_seconds": 29910.0}
        (folder / "summary.json").write_text(json.dumps(found))
    arguments = ["--dataset", "cifar100", "--tables-only", "--output", str(tmp_path)]
    paper_tables.main(arguments)
    said = capsys.readouterr().out
    assert "| vanilla | 77.12 | 72.68 | 155 | 1222 | 8h18m | 8h18m |" in said
    assert "| A+B+C | 77.12 | 74.14 | 155 | 505 | 8h18m | 13h26m |" in said


@pytest.mark.parametrize(("seconds", "text"), [(4.6, "0m05s"), (3599.4, "59m59s"), (3600, "1h00m"), (48360, "13h26m")])
def test_duration(seconds, text):
    assert paper_tables.duration(seconds) == text


def test_mistakes(tmp_path, capfd):
    """A run that fails is named and ends the program; so does a table of nothing."""
    with pytest.raises(SystemExit, match="error: A on digits has ended with code 2"):
        paper_tables.main(["--variants", "A", "--output", str(tmp_path), *TINY, "--lr", "-1"])
    assert "--lr" in capfd.readouterr().err
    with pytest.raises(SystemExit, match="no run in"):
        paper_tables.main(["--tables-only", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="--epochs 3: options of train.py"):
        paper_tables.main(["--tables-only", "--epochs", "3"])


PAPERS = {
    "depth": 100,
    "growth_rate": 12,
    "compression": 0.5,
    "batch_size": 64,
    "lr": 0.1,
    "lr_milestones": [0.5, 0.75],
}
PAPERS |= {
    "lr_gamma": 0.1,
    "momentum": 0.9,
    "nesterov": True,
    "dampening": 0,
    "weight_decay": 1e-4,
    "pad": 4,
    "flip": True,
}


@pytest.mark.parametrize("dataset", ["cifar100", "tiny-imagenet"])
@pytest.mark.parametrize("variant", paper_tables.VARIANTS)
def test_ready_configurations_are_the_papers(dataset, variant):
    """And the defaults of train.py are the same recipe."""
    chosen = options.parse(["--config", str(EXAMPLES / "configs" / f"{dataset}-{variant}.yaml")])
    assert (chosen.dataset, chosen.variant, chosen.epochs) == (dataset, variant, 300 if dataset == "cifar100" else 180)
    assert {name: getattr(chosen, name) for name in PAPERS} == PAPERS
    default = vars(options.parse(["--dataset", dataset, "--variant", variant]))
    assert {name: default[name] for name in PAPERS if name != "flip"} == {
        n: v for n, v in PAPERS.items() if n != "flip"
    }
    assert default["epochs"] == chosen.epochs
