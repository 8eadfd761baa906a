"""Where loralib 0.1.2 goes wrong: the fault is shown, and ours is right."""

from __future__ import annotations

import copy
import pickle

import loralib as theirs
import pytest
import torch
from loralib_layers import close, some_input, stirred
from torch import nn

import phinetune.lora as ours
from phinetune.base.errors import SettingsError


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "Conv3d"])
def test_convolutions_of_any_width_have_a_fitting_update(name, groups):
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "r": 2, "groups": groups}
    x = some_input(name)
    if name != "Conv2d":
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            getattr(theirs, name)(**arguments)(x)
    layer = stirred(getattr(ours, name)(**arguments))
    out = layer(x)
    assert layer.delta().shape == layer.conv.weight.shape
    base = copy.deepcopy(layer.conv)
    base.weight.data += layer.delta()
    close(out, base(x))
    # Gradients are those of the dense weight W + s · B A.
    a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    weight = layer.conv.weight.detach() + layer.scaling * (b @ a).view(layer.conv.weight.shape)
    dense = layer.conv._conv_forward(x, weight, layer.conv.bias)
    direction = torch.linspace(-0.1, 0.1, out.numel()).view(out.shape)
    (dense * direction).sum().backward()
    (out * direction).sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, a.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.lora_B.grad, b.grad, rtol=1e-5, atol=1e-6)
    close(layer.eval()(x), out)


def test_a_width_per_direction_is_refused_with_the_reason():
    with pytest.raises((AssertionError, TypeError)):
        theirs.Conv2d(4, 6, (3, 3), r=2)
    with pytest.raises(SettingsError, match="kernel_size cannot be"):
        ours.Conv2d(4, 6, (3, 3), r=2)


CASES = [
    ("Linear", {"in_features": 12, "out_features": 7, "r": 3}),
    ("Linear", {"in_features": 12, "out_features": 7, "r": 3, "fan_in_fan_out": True}),
    ("MergedLinear", {"in_features": 12, "out_features": 9, "r": 3, "enable_lora": [True, False, True]}),
    ("Embedding", {"num_embeddings": 11, "embedding_dim": 6, "r": 2}),
    ("Conv2d", {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "r": 2}),
]


def drift(layer):
    weight = (layer.conv if hasattr(layer, "conv") else layer).weight
    before = weight.detach().clone()
    for _ in range(50):
        layer.eval()
        layer.train()
    return (weight.detach().float() - before.float()).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_merging_and_taking_out_again_changes_no_bit(name, arguments, dtype):
    assert drift(stirred(getattr(theirs, name)(**arguments).to(dtype))) > 0
    assert drift(stirred(getattr(ours, name)(**arguments).to(dtype))) == 0


def test_a_merge_in_bfloat16_rounds_once():
    errors = []
    for library in (theirs, ours):
        torch.manual_seed(0)
        layer = stirred(library.Linear(64, 64, r=8)).to(torch.bfloat16).requires_grad_(False)
        exact = layer.weight.double() + layer.lora_B.double() @ layer.lora_A.double() * layer.scaling
        layer.eval()
        errors.append(float((layer.weight.double() - exact).abs().max()))
        step = 2.0 ** (torch.frexp(exact).exponent - 8)  # between two neighbours in bfloat16
        is_nearest = (layer.weight.double() - exact).abs() <= step / 2 + 1e-6
        assert bool(is_nearest.all()) == (library is ours)
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "Conv3d"])
def test_the_dropout_of_a_convolution_is_not_ignored(name):
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 1, "r": 2, "lora_dropout": 0.5}
    x = some_input(name)
    ignoring = stirred(getattr(theirs, name)(**arguments))
    assert torch.equal(ignoring(x), ignoring(x))
    layer = stirred(getattr(ours, name)(**arguments))
    torch.manual_seed(3)
    out = layer(x)
    assert not torch.equal(out, layer(x))
    # Dense: the base sees x, the update what dropout leaves of it.
    torch.manual_seed(3)
    left = nn.functional.dropout(x, 0.5)
    update = copy.deepcopy(layer.conv)
    update.weight.data, update.bias = layer.delta(), None
    close(out, layer.conv(x) + update(left))
    mean = torch.stack([layer(x) for _ in range(400)]).mean(dim=0)
    assert (mean - layer.eval()(x)).abs().max() < 0.25 * out.abs().max()
    torch.manual_seed(3)
    plain = getattr(ours, name)(**arguments | {"r": 0}).train()
    assert torch.equal(plain(x), plain(x))


@pytest.mark.parametrize("enable_lora", [[False], [False, False, False]])
def test_a_merged_layer_with_nothing_enabled_is_a_plain_one(enable_lora):
    torch.manual_seed(0)
    with pytest.raises(AttributeError):
        theirs.MergedLinear(12, 9, r=2, enable_lora=enable_lora)(some_input("Linear"))
    layer = ours.MergedLinear(12, 9, r=2, enable_lora=enable_lora)
    x = some_input("Linear")
    close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    close(layer.eval()(x), layer.train()(x))
    assert layer.weight.requires_grad


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("enabled", [[True, True, True], [True, False, True], [False, True, False]])
def test_unequal_parts_are_the_same_as_separate_layers(enabled, fan_in_fan_out):
    sizes = [12, 4, 4]  # as 3072, 1024, 1024 of Phi-4-mini
    layer = stirred(
        ours.MergedLinear(
            12, 20, r=2, lora_alpha=6, enable_lora=enabled, out_splits=sizes, fan_in_fan_out=fan_in_fan_out
        )
    )
    assert layer.weight.shape == ((12, 20) if fan_in_fan_out else (20, 12))
    assert layer.lora_A.shape == (2 * sum(enabled), 12)
    assert layer.lora_B.shape == (sum(size for size, on in zip(sizes, enabled, strict=True) if on), 2)
    parts_a, parts_b = (
        iter(layer.lora_A.split(2)),
        iter(layer.lora_B.split([s for s, on in zip(sizes, enabled, strict=True) if on])),
    )
    x = some_input("Linear")
    expected, separate = [], []
    for size, on, weight, bias in zip(
        sizes,
        enabled,
        (layer.weight.t() if fan_in_fan_out else layer.weight).split(sizes),
        layer.bias.split(sizes),
        strict=True,
    ):
        part = ours.Linear(12, size, r=2 * on, lora_alpha=6)
        part.weight.data, part.bias.data = weight.data.clone(), bias.data.clone()
        if on:
            part.lora_A.data, part.lora_B.data = next(parts_a).data.clone(), next(parts_b).data.clone()
            separate.append(part)
        expected.append(part(x))
    out, whole = layer(x), torch.cat(expected, -1)
    close(out, whole)
    direction = torch.linspace(-0.1, 0.1, out.numel()).view(out.shape)
    (out * direction).sum().backward()
    (whole * direction).sum().backward()
    close(layer.lora_A.grad, torch.cat([part.lora_A.grad for part in separate]))
    close(layer.lora_B.grad, torch.cat([part.lora_B.grad for part in separate]))
    close(layer.eval()(x), whole)


@pytest.mark.parametrize("splits", [None, [12, 4], [12, 4, 5]])
def test_parts_that_do_not_fill_the_outputs_are_refused(splits):
    with pytest.raises(AssertionError, match="must divide"):
        theirs.MergedLinear(12, 20, r=2, enable_lora=[True, True, True])
    with pytest.raises(SettingsError, match="do not fill its outputs"):
        ours.MergedLinear(12, 20, r=2, enable_lora=[True, True, True], out_splits=splits)


def test_an_unknown_bias_is_refused_with_the_nearest():
    with pytest.raises(NotImplementedError):
        theirs.mark_only_lora_as_trainable(nn.Linear(2, 2), bias="lora")
    with pytest.raises(SettingsError) as caught:
        ours.mark_only_lora_as_trainable(nn.Linear(2, 2), bias="lora")
    assert "lora_only" in caught.value.do


def test_the_bias_of_an_adapted_convolution_counts_as_one():
    nets = [nn.Sequential(lib.Conv2d(4, 6, 3, r=2), nn.Conv2d(6, 2, 3)) for lib in (theirs, ours)]
    for lib, net in zip((theirs, ours), nets, strict=True):
        lib.mark_only_lora_as_trainable(net, bias="lora_only")
    assert not nets[0][0].conv.bias.requires_grad
    assert nets[1][0].conv.bias.requires_grad
    assert not nets[1][1].bias.requires_grad
    assert sorted(ours.lora_state_dict(nets[1], "lora_only")) == ["0.conv.bias", "0.lora_A", "0.lora_B"]


def test_a_bias_that_is_trained_is_saved_even_where_the_rank_is_zero():
    for library in (theirs, ours):
        net = nn.Sequential(library.Linear(3, 4, r=2), library.Linear(4, 2))
        library.mark_only_lora_as_trainable(net, bias="lora_only")
        assert net[1].bias.requires_grad
        assert ("1.bias" in library.lora_state_dict(net, bias="lora_only")) == (library is ours)


@pytest.mark.parametrize("name", ["Linear", "Conv2d"])
def test_a_state_dict_says_whether_its_weight_is_merged(name):
    arguments = dict(CASES)[name] if name == "Conv2d" else CASES[0][1]
    x = some_input(name)
    wrong = stirred(getattr(theirs, name)(**arguments))
    before = wrong(x)
    wrong.eval()
    training = getattr(theirs, name)(**arguments)
    training.load_state_dict(copy.deepcopy(wrong.state_dict()))
    assert (training(x) - before).abs().max() > 0.1, "the update counts twice"
    trained = stirred(getattr(ours, name)(**arguments))
    expected = trained(x)
    for saved_in in (True, False):
        weights = copy.deepcopy(trained.train(saved_in).state_dict())
        for loaded_in in (True, False):
            fresh = getattr(ours, name)(**arguments).train(loaded_in)
            fresh.load_state_dict(weights)
            close(fresh(x), expected)
            close(fresh.train(not loaded_in)(x), expected)


def test_an_update_loaded_into_a_merged_layer_takes_the_place_of_the_old_one():
    wrong, new = stirred(theirs.Linear(12, 7, r=3)), stirred(stirred(theirs.Linear(12, 7, r=3)))
    wrong.eval()
    weight, before = wrong.weight.clone(), wrong(some_input("Linear"))
    wrong.load_state_dict(theirs.lora_state_dict(new), strict=False)
    assert torch.equal(wrong(some_input("Linear")), before), "nothing changed"
    wrong.train()
    wrong.eval()
    assert (wrong.weight - weight).abs().max() < 1e-6, "and the base is spoilt in its place"

    layer, other = stirred(ours.Linear(12, 7, r=3)), stirred(ours.Linear(12, 7, r=3))
    stirred(other)
    base = layer.weight.clone()
    layer.eval()
    layer.load_state_dict(ours.lora_state_dict(other), strict=False)
    x = some_input("Linear")
    expected = nn.functional.linear(x, base + other.lora_B @ other.lora_A * other.scaling, layer.bias)
    close(layer(x), expected)
    assert torch.equal(layer.train().weight, base)


def test_changing_the_state_gives_the_layer_back_as_in_torch():
    assert theirs.Linear(2, 2).train() is None
    layer = ours.Linear(2, 2)
    assert layer.train() is layer


def test_a_change_written_into_a_merged_weight_stays():
    layer = stirred(ours.Linear(12, 7, r=3))
    base = layer.weight.clone()
    layer.eval()
    with torch.no_grad():
        layer.weight.add_(1.0)
    close(layer.train().weight, base + 1)


def test_a_tensor_put_in_the_place_of_a_merged_weight_does_not_outlast_the_merge():
    layer = stirred(ours.Linear(12, 7, r=3))
    base = layer.weight.clone()
    layer.eval()
    layer.weight.data = torch.zeros(7, 12)
    assert torch.equal(layer.train().weight, base)


def test_a_merged_layer_can_be_copied_and_moved_to_another_type():
    layer = stirred(ours.Linear(12, 7, r=3))
    base = layer.weight.clone()
    twin = copy.deepcopy(layer.eval()).to(torch.float64)
    assert torch.equal(twin.train().weight, base.double())
    assert torch.equal(layer.train().weight, base)


def test_an_embedding_made_from_a_table_keeps_it():
    table = torch.randn(11, 6)
    assert not torch.equal(theirs.Embedding(11, 6, r=2, _weight=table.clone()).weight, table)
    layer = ours.Embedding(11, 6, r=2, _weight=table)
    assert torch.equal(layer.weight, table)
    assert layer.lora_A.requires_grad
    assert not layer.lora_A.any()
    assert layer.lora_B.any()


def test_an_embedding_with_max_norm_answers_the_same_in_evaluation():
    ids = some_input("Embedding")
    for library in (theirs, ours):
        bounded = stirred(library.Embedding(11, 6, r=2, max_norm=1.0))
        trained = bounded(ids)
        bounded.eval()
        assert ((bounded(ids) - trained).abs().max() < 1e-6) == (library is ours)
        assert bounded.merged == (library is theirs)


def test_a_model_can_be_pickled_whole():
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(theirs.Linear(12, 7, r=3))
    layer = stirred(ours.Linear(12, 7, r=3)).eval()
    twin = pickle.loads(pickle.dumps(layer))
    assert torch.equal(twin(some_input("Linear")), layer(some_input("Linear")))
    assert torch.equal(twin.train().weight, layer.train().weight)
