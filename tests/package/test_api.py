"""The public names that a user of PyTorch would guess exist, and behave as guessed."""

import importlib
import inspect
import pickle
import pickletools
from pathlib import Path

import pytest
import torch

import densenet_ext
from densenet_ext import DenseNetBC, EfficientDenseBlock, EfficientDenseLayer, functional

NEW = {
    "layer": lambda **options: EfficientDenseLayer(4, 3, **options),
    "block": lambda **options: EfficientDenseBlock(2, 4, 3, **options),
    "network": lambda **options: DenseNetBC(3, block_config=(2, 2), in_channels=4, **options),
}
MODULES = (
    *("demo", "drop_channel", "factories", "fallback", "functional", "info", "layers", "memory", "models"),
    *("squeeze_excitation", "weights"),
)


@pytest.mark.parametrize("kind", NEW)
def test_true_means_fused(kind, monkeypatch):
    """True may be passed or set: the attribute reads 'fused', the fused op runs, and the numbers are those of False."""
    calls = []
    for name in ("dense_layer", "dense_stage"):
        op = getattr(functional, name)
        monkeypatch.setattr(functional, name, lambda *args, op=op, **options: calls.append(op) or op(*args, **options))
    x = torch.randn(2, 4, 8, 8, dtype=torch.double)
    torch.manual_seed(1)
    module = NEW[kind](efficient=True).double()
    assert module.efficient == "fused"
    y = module(x)
    assert calls
    module.efficient = False
    torch.testing.assert_close(module(x), y, rtol=1e-9, atol=1e-9)
    module.efficient = True
    assert {m.efficient for m in module.modules() if hasattr(m, "efficient")} == {"fused"}


@pytest.mark.parametrize("kind", NEW)
def test_drop_channel_rate(kind):
    """drop_channel_rate reads and sets the probability of the module `drop_channel`."""
    module = NEW[kind](drop_channel=0.25)
    layer = next(m for m in module.modules() if isinstance(m, EfficientDenseLayer))
    assert layer.drop_channel_rate == layer.drop_channel.p == 0.25
    layer.drop_channel_rate = 0.75
    assert layer.drop_channel.p == 0.75
    assert abs((layer.drop_channel(torch.ones(100, 100, 1, 1)) == 0).double().mean() - 0.75) < 0.02


def keywords(callable):
    parameters = inspect.signature(callable).parameters.values()
    return {p.name: (p.default, p.annotation) for p in parameters if p.default is not p.empty}


def test_a_layers_keywords_are_a_blocks_and_a_networks():
    layer = keywords(EfficientDenseLayer)
    assert keywords(EfficientDenseBlock) == layer
    assert layer.items() <= keywords(DenseNetBC).items()


@pytest.mark.parametrize("make", [NEW["block"], lambda **options: DenseNetBC.variant("A", **options)])
def test_an_unknown_keyword_is_named(make):
    with pytest.raises(TypeError, match="unexpected keyword argument 'dropout'"):
        make(dropout=0.2)


def test_every_argument_of_a_block_reaches_its_layers():
    options = {"drop_rate": 0.1, "drop_channel": 0.2, "drop_channel_position": "pre_conv", "se_reduction": 2}
    options |= {"efficient": "checkpoint", "keep_bottleneck": True, "eps": 0.1, "momentum": 0.2}
    layer = EfficientDenseBlock(2, 4, 3, 5, **options).denselayer2
    single = EfficientDenseLayer(7, 3, 5, **options)
    assert repr(layer) == repr(single)
    for name in ("drop_rate", "drop_channel_rate", "drop_channel_position", "efficient", "keep_bottleneck"):
        assert getattr(layer, name) == getattr(single, name) == options.get(name, 0.2)


def test_public_names_are_there():
    for name in densenet_ext.__all__:
        assert hasattr(densenet_ext, name), name
    assert densenet_ext.memory is importlib.import_module("densenet_ext.memory")
    assert densenet_ext.functional is functional


@pytest.mark.parametrize("name", MODULES)
def test_public_signatures_are_annotated(name):
    """Type checkers look into the package, since it has the marker py.typed."""
    assert Path(densenet_ext.__file__).with_name("py.typed").exists()
    module = importlib.import_module(f"densenet_ext.{name}")
    members = [
        m for key, m in vars(module).items() if getattr(m, "__module__", "") == module.__name__ and key[0] != "_"
    ]
    functions = [m for m in members if inspect.isfunction(m)]
    for kind in filter(inspect.isclass, members):
        methods = [m.fget if isinstance(m, property) else m for m in vars(kind).values()]
        # A dataclass has methods that dataclasses wrote; those in the module's file are meant.
        functions += [m for m in methods if inspect.isfunction(m) and m.__code__.co_filename == module.__file__]
    assert functions
    for function in functions:
        signature = inspect.signature(function)
        missing = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
        assert not missing, (function.__qualname__, missing)
        assert function.__name__ == "__init__" or signature.return_annotation is not signature.empty, function


@pytest.mark.parametrize("kind", NEW)
def test_pickles_name_public_modules(kind):
    """Another version can read a pickled network only if its classes stay in the same modules."""
    names = [op[1] for op in pickletools.genops(pickle.dumps(NEW[kind]())) if isinstance(op[1], str)]
    used = {name for name in names if name.startswith("densenet_ext.")}
    assert used and used <= {f"densenet_ext.{name}" for name in MODULES}
