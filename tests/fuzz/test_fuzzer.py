"""The fuzzer finds planted faults, and draws everything that it should."""

import math
from itertools import count

import pytest
import torch

from densenet_ext import _reasons, _stage_arguments, functional
from densenet_ext._ops import autograd
from fuzz import compare
from fuzz.draw import LAYOUTS, MODES, PRECISIONS, draw_network
from fuzz.libraries import LIBRARIES
from fuzz.noise import Noise
from fuzz.run import run

# Each fault is a relative error: far more than the type's rounding, far less than that of a wrong formula.
FAULTS = {"float64": 1e-6, "bfloat16": 0.2, "float32": 1e-3, "float16": 0.05, "autocast bfloat16": 0.2}


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """Use few draws: deliberate faults are wrong in every draw, and the usual number of draws takes long."""
    monkeypatch.setattr(compare, "DRAWS", 4)


def small_network(precision="float64", **wanted):
    """The first small network that is trained and has this precision and these options or properties."""
    for seed in count():
        network = draw_network(seed)
        values = {**vars(network), **network.options, "masked": network.options["drop_channel"] > 0.3}
        usual = network.norms == "affine" and network.running == "all" and network.gradients == "inputs too"
        trained = network.modes == ("train", "train") and network.frozen == "none"
        small = network.samples in (2, 3) and 8 <= math.prod(network.size) <= 200
        fits = all(values[key] == value for key, value in {"precision": precision, **wanted}.items())
        if usual and trained and small and fits and run(network, False).error is None:
            return network


def assert_found(network, result):
    """Assert that this fault is reported, and that all reports are about the fused implementation."""
    lines = compare.differences(network)
    assert all(line.startswith("fused: ") for line in lines)
    assert any(result in line for line in lines), f"{lines}\n{network}"


@pytest.mark.repetitions(2)
@pytest.mark.parametrize("precision", FAULTS)
def test_a_wrong_gradient_is_found(monkeypatch, precision):
    original = autograd._wanted

    def wrong(grads, needed):
        return [None if grad is None else grad * (1 + FAULTS[precision]) for grad in original(grads, needed)]

    network = small_network(precision, kind="model")
    assert compare.differences(network) == []
    monkeypatch.setattr(autograd, "_wanted", wrong)
    assert_found(network, "gradient of features.norm5.bias")


def test_one_wrong_value_of_the_inputs_gradient_is_found(monkeypatch):
    original = autograd._wanted

    def wrong(grads, needed):
        dx, *rest = original(grads, needed)
        error = torch.zeros_like(dx)
        error.view(-1)[0] = 1e-6 * dx.abs().max()
        return [dx + error, *rest]

    network = small_network(kind="block", model_layout="contiguous", upstream="contiguous")
    monkeypatch.setattr(autograd, "_wanted", wrong)
    assert_found(network, "gradient of input 0")


@pytest.mark.repetitions(2)
@pytest.mark.parametrize("precision", FAULTS)
def test_a_wrong_statistic_is_found(monkeypatch, precision):
    original = _stage_arguments.update_running_statistics

    def wrong(norms, widths, stats, values):
        original(norms, widths, torch.stack([stats[0], stats[1] * (1 + FAULTS[precision])]), values)

    network = small_network(precision, momentum=1.0)
    assert compare.differences(network) == []
    monkeypatch.setattr(_stage_arguments, "update_running_statistics", wrong)
    assert_found(network, "running_var")


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_a_batch_counted_twice_is_found(monkeypatch, precision):
    original = _stage_arguments.update_running_statistics

    def twice(norms, widths, stats, values):
        for norm in norms:
            norm.num_batches_tracked.add_(1)
        original(norms, widths, stats, values)

    monkeypatch.setattr(_stage_arguments, "update_running_statistics", twice)
    assert_found(small_network(precision), "num_batches_tracked")


@pytest.mark.repetitions(2)
@pytest.mark.parametrize("precision", FAULTS)
def test_other_masks_are_found(monkeypatch, precision):
    """Every layer gets the masks that the generator would draw after one more number."""
    original = _stage_arguments.draw_masks

    def later(layer, x, channels):
        torch.rand(1)
        return original(layer, x, channels)

    network = small_network(precision, masked=True)
    monkeypatch.setattr(_stage_arguments, "draw_masks", later)
    assert_found(network, "output")


def test_a_quiet_fallback_is_found(monkeypatch):
    monkeypatch.setattr(_reasons, "input_reason", lambda inputs: "of a whim")
    assert "cannot be used: of a whim" in compare.differences(small_network())[0]


def test_an_error_of_the_fused_implementation_alone_is_found(monkeypatch):
    def fail(*args, **options):
        raise ValueError("of a whim")

    network = small_network(kind="block")
    monkeypatch.setattr(functional, "dense_stage", fail)
    assert compare.differences(network) == ["fused: ends with ValueError('of a whim'), plain with None"]


def test_noise_of_level_0_is_plain():
    """Noise has its own formula of norms, which has to agree with PyTorch's."""
    for kind in ("model", "block", "layer"):
        network = small_network(kind=kind)
        got, want = (run(network, False, noise=noise).results for noise in (Noise(0.0, 0), None))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_a_seed_means_one_network():
    for seed in range(20):
        first, second = draw_network(seed), draw_network(seed)
        assert first == second
        for draw in range(2):
            states = [network.build(draw).state_dict() for network in (first, second)]
            torch.testing.assert_close(*states, rtol=0, atol=0)
            leaves = [network.leaves(1, draw) for network in (first, second)]
            torch.testing.assert_close(*leaves, rtol=0, atol=0)


def test_everything_is_drawn():
    """The 200 networks of a short run have every kind, layout, mode and option."""
    drawn = [draw_network(seed) for seed in range(200)]

    def values(of):
        return {of(network) for network in drawn}

    assert values(lambda n: n.kind) == {"model", "block", "layer"}
    assert values(lambda n: n.precision) == set(PRECISIONS)
    assert {mode for n in drawn for mode in n.modes} == set(MODES)
    assert {layout for n in drawn for _, layout in n.inputs} == set(LAYOUTS)
    assert values(lambda n: n.threads) == {1, 2, 3, 4}
    assert {0, 1, 2, 3, 4, 5} <= values(lambda n: n.samples)
    assert values(lambda n: n.frozen) == {"none", "some", "all"}
    assert values(lambda n: n.running) == {"all", "some", "none"}
    growth = values(lambda n: n.options["growth_rate"])
    assert min(growth) == 1 and max(growth) > 35
    for flag in ("small_inputs", "keep_bottleneck", "first_twice", "poisoned"):
        found = [{**n.options, **vars(n)}.get(flag) for n in drawn]
        assert True in found and False in found, flag
    assert {True, False, "auto", 2, 3, 4} <= {n.keep_bottleneck for n in drawn}
    assert {n.library for n in drawn} == {"", *LIBRARIES}
    masks = [(n.options["drop_rate"] > 0, n.options["drop_channel"] > 0) for n in drawn]
    assert len(set(masks)) == 4
    assert any(math.prod(n.size) == max(n.size) > 1 for n in drawn), "a single row or column"
    assert any(n.options["momentum"] is None for n in drawn)
