"""State dicts of other libraries and wrappers load, or end with a short error."""

import re

import pytest
import torch
from small_networks import SMALL, norms
from torch import nn

from densenet_ext import DenseNetBC, EfficientDenseBlock


def network(seed, **options):
    torch.manual_seed(seed)
    model = DenseNetBC(**SMALL, **options).double()
    for norm in norms(model):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return model


def renamed(pattern, replacement):
    return lambda state: {re.sub(pattern, replacement, key): value for key, value in state.items()}


def in_front(prefix):
    return lambda state: {prefix + key: value for key, value in state.items()}


def chain(*changes):
    def change(state):
        for each in changes:
            state = each(state)
        return state

    return change


OLD = renamed(r"(denselayer\d+)\.(norm|conv)(\d)\.", r"\1.\2.\3.")
FOREIGN = {
    "its own": dict,
    "torchvision's of 2017": OLD,
    "of DataParallel": in_front("module."),
    "of torch.compile": in_front("_orig_mod."),
    "of both": in_front("module._orig_mod."),
    "of a network inside another, of 2017": chain(
        OLD, renamed(r"^classifier\.", "classifier.0."), in_front("module.densenet121.")
    ),
    "MONAI's": chain(
        renamed(r"(denselayer\d+)\.(norm|conv)", r"\1.layers.\2"), renamed(r"^classifier\.", "class_layers.out.")
    ),
    "without num_batches_tracked": lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_keys_of_others_load(kind):
    theirs, ours, x = network(0).eval(), network(1).eval(), torch.randn(2, 3, 8, 8, dtype=torch.double)
    state = FOREIGN[kind](theirs.state_dict())
    keys = list(state)
    assert not torch.allclose(ours(x), theirs(x))
    assert str(ours.load_state_dict(state)) == "<All keys matched successfully>"
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    assert list(state) == keys, "the caller's dictionary was changed"


def test_a_part_of_another_network_loads():
    """In a larger module only the layers' names are translated: the prefix belongs to that module."""
    theirs, ours = nn.ModuleList([network(0)]), nn.ModuleList([network(1)])
    ours.load_state_dict(OLD(theirs.state_dict()))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    block = EfficientDenseBlock(2, 6, 3, 2).double()
    block.load_state_dict(OLD(theirs[0].features.denseblock1.state_dict()))
    torch.testing.assert_close(block.state_dict(), theirs[0].features.denseblock1.state_dict(), rtol=0, atol=0)


def test_a_replaced_classifier_keeps_its_keys():
    """CheXNet puts the classifier into a Sequential; a network that was changed so loads its own state dict."""
    theirs, ours = network(0), network(1)
    for model in (theirs, ours):
        model.classifier = nn.Sequential(model.classifier, nn.Sigmoid())
    for change in (dict, in_front("module.")):
        ours.load_state_dict(change(theirs.state_dict()))
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def test_keys_that_do_not_fit_are_an_error_one_can_read():
    state = DenseNetBC(growth_rate=3, depth=40, num_classes=7).double().state_dict()
    with pytest.raises(RuntimeError) as caught:
        network(0, se_reduction=1).load_state_dict(
            {f"encoder{i}.{key}": v for i in range(3) for key, v in state.items()}
        )
    message = str(caught.value)
    assert len(message) < 1500
    assert 'Missing key(s) in state_dict: "features.conv0.weight"' in message
    assert 'Unexpected key(s) in state_dict: "encoder0.features.conv0.weight"' in message
    with pytest.raises(RuntimeError, match="size mismatch for features") as caught:
        network(0).load_state_dict(state)
    assert len(str(caught.value)) < 1500 and "more" in str(caught.value)


def test_missing_keys_are_returned_where_that_is_allowed():
    model = network(0)
    state = model.state_dict()
    del state["features.conv0.weight"]
    assert model.load_state_dict(state, strict=False).missing_keys == ["features.conv0.weight"]
