"""paper_tables.py: runs variants, and writes the paper's tables from their results."""

import contextlib
import csv
import io
import json

import paper_tables
import pytest
import training_cases as cases
from training import options

TINY = "--depth 10 --growth-rate 4 --image-size 8 --epochs 2 --limit-steps 4 --threads 1 --device cpu".split()


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """The folder of a call that runs one variant."""
    folder = tmp_path_factory.mktemp("paper")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        paper_tables.main(["--variants", "A+B+C", "--output", str(folder), *TINY])
    assert (folder / "tables.md").read_text() in printed.getvalue()
    return folder


def test_table_is_the_summary(output):
    found = cases.summary(output / "digits-A+B+C")
    assert (found["variant"], found["efficient"], found["steps"]) == ("A+B+C", "fused", 4)
    with open(output / "digits.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    for name in ("test_accuracy", "peak_memory_mb", "train_seconds"):
        assert float(row[name]) == found[name]
    assert f"| A+B+C | {found['test_accuracy']:.2f} | – |" in (output / "tables.md").read_text()
    for figure in ("digits-loss.png", "digits-accuracy.png"):
        assert (output / figure).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_papers_figures_stand_beside_ours(output, tmp_path, capsys):
    """A run on digits stands for one on CIFAR-100."""
    figures = {"test_accuracy": 77.125, "peak_memory_mb": 155.4, "train_seconds": 29910.0}
    for variant in ("vanilla", "A+B+C"):
        folder = tmp_path / f"cifar100-{variant}"
        folder.mkdir()
        for name in ("metrics.csv", "environment.json"):
            (folder / name).write_bytes((output / "digits-A+B+C" / name).read_bytes())
        (folder / "summary.json").write_text(json.dumps({**cases.summary(output / "digits-A+B+C"), **figures}))
    paper_tables.main(["--dataset", "cifar100", "--tables-only", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| vanilla | 77.12 | 72.68 | 155 | 1222 | 8h18m | 8h18m |" in printed
    assert "| A+B+C | 77.12 | 74.14 | 155 | 505 | 8h18m | 13h26m |" in printed


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


PAPERS = dict(
    depth=100, growth_rate=12, compression=0.5, batch_size=64, lr=0.1, lr_milestones=[0.5, 0.75], lr_gamma=0.1
)
PAPERS |= dict(momentum=0.9, nesterov=True, dampening=0, weight_decay=1e-4, pad=4)


@pytest.mark.parametrize(["dataset", "epochs"], [("cifar100", 300), ("tiny-imagenet", 180)])
@pytest.mark.parametrize("variant", paper_tables.VARIANTS)
def test_ready_configurations_are_the_papers(dataset, epochs, variant):
    """The defaults of train.py are the same recipe."""
    config = ["--config", str(cases.EXAMPLES / "configs" / f"{dataset}-{variant}.yaml")]
    expected = {**PAPERS, "dataset": dataset, "variant": variant, "epochs": epochs}
    ready, default = (vars(options.parse(argv)) for argv in (config, ["--dataset", dataset, "--variant", variant]))
    for chosen in (ready, default):
        assert {name: chosen[name] for name in expected} == expected
    assert ready["flip"] is True
