"""train.py, evaluate.py and predict.py: what they learn, what they write, what they refuse."""

import csv
import json
import re

import evaluate
import predict
import pytest
import torch
import train
import training_cases as cases
from train_in_float64 import build_in_float64
from training import engine, options
from training.model import build

# Learns the digits in 4 epochs of 39 steps, 2 to 4 seconds on one core.
LEARNING = "--image-size 16 --growth-rate 12 --lr 0.1 --epochs 4 --lr-milestones 0.7 --pad 1 --variant".split()
# Test losses after it: 0.12 to 0.25 for the five variants. See also `test_bound_is_out_of_reach`.
BOUND = 0.35


@pytest.mark.slow
@pytest.mark.repetitions(2)
@pytest.mark.parametrize("variant", ["A+B+C", "vanilla", "A", "B", "A+B"])
def test_variants_learn(variant, tmp_path):
    cases.train(tmp_path, *LEARNING, variant)
    found = cases.summary(tmp_path)
    assert found["test_loss"] < BOUND and found["test_accuracy"] > 88
    assert found["efficient"] == ("fused" if variant == "A+B+C" else "plain")


BROKEN = {
    "no gradient in the blocks": ("denseblock", torch.zeros_like),  # 1.23
    "gradient of one convolution with the wrong sign": ("denseblock2.denselayer1.conv2", torch.neg),  # 0.59
}


@pytest.mark.slow
@pytest.mark.parametrize(["part", "change"], BROKEN.values(), ids=BROKEN)
def test_bound_is_out_of_reach(part, change, tmp_path, monkeypatch):
    """A network with a broken gradient reaches the losses that stand above."""

    def broken(*arguments):
        model = build(*arguments)
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.register_hook(change)
        return model

    monkeypatch.setattr(engine, "build", broken)
    cases.train(tmp_path, *LEARNING, "A+B+C")
    assert cases.summary(tmp_path)["test_loss"] > BOUND + 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ["dtype", "steps", "bound"], [(torch.float32, 1, 1e-5), (torch.float64, 100, 5e-7)], ids=["float32", "float64"]
)
def test_fused_variant_has_the_loss_curve_of_the_plain_one(dtype, steps, bound, tmp_path, monkeypatch):
    """A+B and A+B+C from one seed: in float64 the recorded losses, which are float32, are equal. Other masks make 4e-2.

    In float32 single ReLUs fall on the other side in some step, by seed and by instruction set, and from there on two runs
    of the plain network in two memory formats part too: there the first loss has to do, which no side of a ReLU moves.
    """

    monkeypatch.setattr(engine, "build", build if dtype == torch.float32 else build_in_float64)
    options = f"--image-size 16 --growth-rate 12 --lr 0.003 --epochs 5 --limit-steps {steps} --variant".split()
    curves = []
    for variant in ("A+B", "A+B+C"):
        cases.train(tmp_path / variant, *options, variant)
        curves.append(torch.tensor([loss for _, loss in cases.scalars(tmp_path / variant, "train/loss")]))
    assert len(curves[0]) == steps
    torch.testing.assert_close(curves[1], curves[0], rtol=0, atol=bound)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run with an end within the second epoch, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    arguments = [*cases.SMALL, "--lr", "0.05", "--epochs", "2", "--limit-steps", "60", "--output", folder]
    done = cases.run("train.py", *arguments)
    (folder / "stdout.txt").write_text(done.stdout)
    (folder / "stderr.txt").write_text(done.stderr)
    return folder


def test_lines_without_a_terminal(run):
    lines = (run / "stdout.txt").read_text().splitlines()
    assert len(lines) == 3
    for number, line in enumerate(lines[:2], 1):
        pattern = rf"epoch {number}/2: train loss \d\.\d{{4}}, accuracy [\d.]+ %; validation loss .*; \d+ images/s, peak \d+ MB"
        assert re.fullmatch(pattern, line), line
    found = cases.summary(run)
    assert lines[2].startswith(f"{run}: test accuracy {found['test_accuracy']:.2f} %, loss {found['test_loss']:.4f}")
    assert "step/s" not in (run / "stderr.txt").read_text()  # no bar


def test_run_folder(run):
    names = {"config.yaml", "environment.json", "splits.json", "data.json", "metrics.csv", "tensorboard", "checkpoints"}
    names |= {"best.safetensors", "loss.png", "accuracy.png", "summary.json", "stdout.txt", "stderr.txt"}
    assert {path.name for path in run.iterdir()} == names
    data, environment = (json.loads((run / f"{name}.json").read_text()) for name in ("data", "environment"))
    assert data["channels"] == 1 and data["image_size"] == 8 and len(data["classes"]) == 10
    assert environment["torch"] == torch.__version__ and environment["threads"] == 1 and environment["device"] == "cpu"
    for figure in ("loss.png", "accuracy.png"):
        assert (run / figure).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_records_agree(run):
    """metrics.csv agrees with TensorBoard and with the summary."""
    rows, found = cases.rows(run), cases.summary(run)
    with open(run / "metrics.csv", newline="") as file:
        assert all(0 < float(row["data_wait_percent"]) < 100 for row in csv.DictReader(file))
    assert [(row["epoch"], row["steps"]) for row in rows] == [("1", "39"), ("2", "60")]
    best = min(rows, key=lambda row: float(row["validation_loss"]))
    assert found["best_epoch"] == int(best["epoch"]) and found["validation_loss"] == float(best["validation_loss"])
    steps, losses = zip(*cases.scalars(run, "train/loss"), strict=True)
    assert steps == tuple(range(1, 61))
    assert sum(losses[:39]) / 39 == pytest.approx(float(rows[0]["train_loss"]), rel=1e-6)
    rates = [rate for _, rate in cases.scalars(run, "train/learning_rate")]
    assert rates == pytest.approx([0.05] * 39 + [0.005] * 21)
    for name in ("validation_loss", "train_accuracy"):
        shown = cases.scalars(run, "epoch/" + name)
        assert shown == [(int(row["steps"]), pytest.approx(float(row[name]))) for row in rows]


def test_config_of_a_run_repeats_it(run, tmp_path):
    assert train.main(["--config", str(run / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    assert cases.weights(tmp_path / "again") == cases.weights(run)
    assert cases.rows(tmp_path / "again") == cases.rows(run)


def test_evaluate(run, tmp_path):
    """The script, started as by a user, finds the figures that the training found."""
    output = tmp_path / "test.json"
    done = cases.run("evaluate.py", run, "--output", output, "--device", "cpu")
    found, figures = cases.summary(run), json.loads(output.read_text())
    assert figures["accuracy"] == found["test_accuracy"]
    assert figures["loss"] == pytest.approx(found["test_loss"], rel=1e-6)
    assert figures["accuracy"] < figures["top5_accuracy"] <= 100
    assert f"{figures['accuracy']:.2f} %" in done.stdout and f"{figures['top5_accuracy']:.2f} %" in done.stdout


def test_evaluate_other_splits_and_weights(run, tmp_path, capsys):
    """Validation with the last weights is the last row; a file may be named; batches do not matter."""
    assert evaluate.main([str(run), "--split", "validation", "--weights", "last", "--batch-size", "7"]) == 0
    last = cases.rows(run)[-1]
    assert f"{float(last['validation_accuracy']):.2f} %" in capsys.readouterr().out
    file = run / "checkpoints" / cases.checkpoints(run)[-1] / "model.safetensors"
    found = []
    for weights in ("last", str(file)):
        output = tmp_path / "train.json"
        assert evaluate.main([str(run), "--split", "train", "--weights", weights, "--output", str(output)]) == 0
        found.append(json.loads(output.read_text()))
    assert found[0]["images"] == 1259 and found[0]["loss"] == found[1]["loss"]


def write_digit(path, number, mode="L", size=(8, 8)):
    """Write one of scikit-learn's digits as an image, and return its pixels."""
    from PIL import Image
    from sklearn.datasets import load_digits

    pixels = (load_digits().images[number] * (255 / 16)).astype("uint8")
    Image.fromarray(pixels).resize(size).convert(mode).save(path)
    return pixels


def test_predict(run, tmp_path):
    """The script, started as by a user, gets digits of another size and mode; one file is missing, one is no image."""
    for number, mode in enumerate(("L", "RGB", "P")):
        write_digit(tmp_path / f"{number}.png", number, mode, (40, 40))
    (tmp_path / "text.png").write_text("no image")
    files = [tmp_path / name for name in ("0.png", "missing.png", "1.png", "text.png", "2.png")]
    done = cases.start(*cases.command("predict.py", run, *files, "--top", "2", "--device", "cpu"))
    assert done.returncode == 2
    assert "missing.png cannot be read" in done.stderr and "text.png cannot be read" in done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [str(files[i]) for i in (0, 0, 2, 2, 4, 4)]
    for better, worse in zip(lines[::2], lines[1::2], strict=True):
        assert 100 >= float(better[2]) >= float(worse[2]) > 0 and better[1] != worse[1]


def test_prediction_is_the_networks(run, tmp_path, capsys):
    """The probability printed is the softmax of the network's output for the normalized image."""
    from safetensors.torch import load_file

    pixels = write_digit(tmp_path / "seven.png", 7)
    assert predict.main([str(run), str(tmp_path / "seven.png"), "--top", "10"]) == 0
    shown = {line.split()[1]: float(line.split()[2]) for line in capsys.readouterr().out.splitlines()}
    data = json.loads((run / "data.json").read_text())
    model = build(options.parse(["--config", str(run / "config.yaml")]), 10, 1).eval()
    model.load_state_dict(load_file(run / "best.safetensors"))
    x = (torch.tensor(pixels)[None, None] / 255 - data["mean"][0]) / data["std"][0]
    expected = 100 * model(x).softmax(1)[0]
    assert [shown[str(label)] for label in range(10)] == pytest.approx(expected.tolist(), abs=0.01)


MISTAKES = {
    "no run": ["{empty}"],
    "no such weights": ["{run}", "--weights", "{empty}/other.safetensors"],
    "weights of another network": ["{run}", "--weights", "{empty}/wrong.safetensors"],
    "no safetensors": ["{run}", "--weights", "{run}/config.yaml"],
    "no such device": ["{run}", "--device", "xpu"],
}


@pytest.mark.parametrize("arguments", MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("script", [evaluate, predict])
def test_mistakes_with_a_run(run, tmp_path, script, arguments, capsys):
    from safetensors.torch import save_file

    save_file({"classifier.bias": torch.zeros(10)}, tmp_path / "wrong.safetensors")
    arguments = [argument.format(run=run, empty=tmp_path) for argument in arguments]
    assert script.main(arguments + ["any.png"] * (script is predict)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and (arguments[-1] in error or "another network" in error)


def test_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "run"
    assert train.main([*cases.SMALL, "--output", str(folder)]) == 2
    assert f"{folder} could not be written: Not a directory" in capsys.readouterr().err


def test_divergence(tmp_path, capsys):
    assert train.main([*cases.SMALL, "--lr", "1e30", "--checkpoint-steps", "1", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.search(r"the loss of step \d is nan, in epoch 1: the training has diverged", error)
    assert "--lr (now 1e+30)" in error
