"""Layer by layer, everything loralib 0.1.2 does right, ours does with the same numbers."""

from __future__ import annotations

import copy

import loralib as theirs
import pytest
import torch
from loralib_layers import close, some_input, stirred
from torch import nn

import phinetune.lora as ours

LINEAR = [
    {"lora_alpha": 16},
    {"fan_in_fan_out": True},
    {"merge_weights": False},
    {"bias": False},
    {"fan_in_fan_out": True, "lora_alpha": 2, "bias": False},
]
TABLE = {"num_embeddings": 11, "embedding_dim": 6, "r": 2}
CONV = {"in_channels": 4, "out_channels": 6, "r": 2}
PARTS = {"in_features": 12, "out_features": 9}
# Name of the layer, its arguments; every option that both take is in at least one row.
CASES = [
    *[("Linear", {"in_features": 12, "out_features": 7, "r": 3, **options}) for options in LINEAR],
    ("Linear", {"in_features": 5, "out_features": 4}),
    *[
        ("MergedLinear", {**PARTS, "r": 2, "enable_lora": [True, False, True], **options})
        for options in LINEAR
    ],
    ("MergedLinear", {**PARTS, "r": 2, "enable_lora": [True, True, True], "lora_alpha": 5}),
    ("MergedLinear", {**PARTS, "r": 2, "enable_lora": [True]}),
    ("MergedLinear", {**PARTS, "r": 0, "enable_lora": [False, True, False]}),
    ("Embedding", {**TABLE, "lora_alpha": 4}),
    ("Embedding", {**TABLE, "padding_idx": 3}),
    ("Embedding", {**TABLE, "padding_idx": -2}),
    ("Embedding", {**TABLE, "scale_grad_by_freq": True}),
    ("Embedding", {**TABLE, "merge_weights": False}),
    ("Embedding", {**TABLE, "max_norm": 0.7, "norm_type": 1.0, "merge_weights": False}),
    ("Embedding", {**TABLE, "r": 0}),
    ("Conv1d", {**CONV, "kernel_size": 1, "lora_alpha": 8}),
    ("Conv1d", {**CONV, "kernel_size": 1, "groups": 2, "stride": 2, "padding": 1, "bias": False}),
    ("Conv1d", {**CONV, "kernel_size": 3, "r": 0}),
    ("Conv2d", {**CONV, "kernel_size": 3, "lora_alpha": 8}),
    ("Conv2d", {**CONV, "kernel_size": 3, "groups": 2, "padding": 1}),
    ("Conv2d", {**CONV, "kernel_size": 2, "stride": 2, "bias": False}),
    ("Conv2d", {**CONV, "kernel_size": 3, "dilation": 2, "padding": 2, "padding_mode": "circular"}),
    ("Conv2d", {**CONV, "kernel_size": 3, "merge_weights": False}),
    ("Conv2d", {**CONV, "kernel_size": 3, "r": 0}),
    ("Conv3d", {**CONV, "kernel_size": 1}),
    ("Conv3d", {**CONV, "kernel_size": 1, "groups": 2, "merge_weights": False}),
]
all_cases = pytest.mark.parametrize(
    ("name", "arguments"), CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)]
)


def pair(name, arguments):
    made = []
    for library in (theirs, ours):
        torch.manual_seed(1)
        made.append(getattr(library, name)(**arguments))
    return made


def input_of(name, arguments):
    return torch.randn(4, 5) if arguments.get("in_features") == 5 else some_input(name)


@all_cases
def test_the_same_seed_gives_the_same_weights_under_the_same_names(name, arguments):
    one, two = pair(name, arguments)
    assert list(one.state_dict()) == list(two.state_dict())
    assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())
    grads = [{key: value.requires_grad for key, value in layer.named_parameters()} for layer in (one, two)]
    assert grads[0] == grads[1]


@all_cases
def test_outputs_and_gradients_are_the_same(name, arguments):
    one, two = (stirred(layer) for layer in pair(name, arguments))
    x = input_of(name, arguments)
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
    outputs = [layer(value) for layer, value in zip((one, two), inputs, strict=True)]
    close(outputs[1], outputs[0])
    for out in outputs:
        (out * torch.linspace(-0.1, 0.1, out.numel()).view(out.shape)).sum().backward()
    if x.is_floating_point():
        close(inputs[1].grad, inputs[0].grad)
    others = dict(two.named_parameters())
    for key, parameter in one.named_parameters():
        assert (parameter.grad is None) == (others[key].grad is None)
        if parameter.grad is not None:
            close(others[key].grad, parameter.grad)


@all_cases
def test_merging_gives_the_same_weight_and_output(name, arguments):
    one, two = (stirred(layer) for layer in pair(name, arguments))
    x = input_of(name, arguments)
    unmerged = two(x)
    close(unmerged, one(x))
    one.eval()
    two.eval()
    for key, value in one.state_dict().items():
        close(two.state_dict()[key], value)
    close(two(x), one(x))
    close(two(x), unmerged)
    is_merged = arguments.get("merge_weights", True)
    assert one.merged == two.merged == is_merged
    before = (two.conv if hasattr(two, "conv") else two).weight.clone()
    two.train()
    assert not two.merged
    changes = is_merged and two.has_lora
    assert changes != torch.equal(before, (two.conv if hasattr(two, "conv") else two).weight)
    close(two(x), unmerged)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluating"])
@all_cases
def test_state_dicts_load_both_ways_with_the_same_outputs(name, arguments, mode):
    x = input_of(name, arguments)
    for source, goal in ((0, 1), (1, 0)):
        trained = stirred(pair(name, arguments)[source])
        fresh = pair(name, arguments)[goal]
        trained.train(mode)
        fresh.train(mode)
        fresh.load_state_dict(copy.deepcopy(trained.state_dict()), strict=True)
        close(fresh(x), trained(x))
        trained.train()
        fresh.train()
        close(fresh(x), trained(x))


@pytest.mark.parametrize(
    ("name", "more"), [("Linear", {}), ("MergedLinear", {"enable_lora": [True, False, True]})]
)
def test_dropout_draws_the_same_numbers(name, more):
    one, two = (stirred(m) for m in pair(name, {**PARTS, "r": 3, "lora_dropout": 0.4, **more}))
    results = []
    for layer in (one, two):
        torch.manual_seed(3)
        results.append(layer(some_input("Linear")))
    close(results[1], results[0])
    assert (two.eval()(some_input("Linear")) - results[1]).abs().max() > 1e-2


class Net(nn.Module):
    """Layers of several kinds, and one without an update."""

    def __init__(self, lora):
        super().__init__()
        self.embed = lora.Embedding(11, 12, r=2)
        self.qkv = lora.MergedLinear(12, 36, r=2, enable_lora=[True, False, True], lora_alpha=4)
        self.norm = nn.LayerNorm(36)
        self.out = lora.Linear(36, 5, r=3, lora_dropout=0.1)
        self.plain = nn.Linear(5, 5)

    def forward(self, ids):
        return self.plain(self.out(self.norm(self.qkv(self.embed(ids)))))


def test_positional_arguments_mean_the_same():
    for name, arguments in (
        ("Linear", (12, 7, 3, 6, 0.0, True, False)),
        ("MergedLinear", (12, 9, 2, 6, 0.0, [True, False, True], True, False)),
        ("Embedding", (11, 6, 2, 6, False)),
        ("Conv2d", (4, 6, 3, 2, 6, 0.0, False)),
    ):
        layers = []
        for library in (theirs, ours):
            torch.manual_seed(1)
            layers.append(stirred(getattr(library, name)(*arguments)))
            layers[-1].eval()
        assert layers[0].merged == layers[1].merged is False
        close(layers[1](some_input(name)), layers[0](some_input(name)))


@pytest.mark.parametrize("name", ["Linear", "MergedLinear", "Embedding", "Conv2d"])
def test_other_types_of_numbers_are_those_of_loralib(name):
    arguments = {**next(case for layer, case in CASES if layer == name), "dtype": torch.float64}
    one, two = (stirred(layer) for layer in pair(name, arguments))
    x = some_input(name)
    x = x.double() if x.is_floating_point() else x
    assert two(x).dtype == one(x).dtype == torch.float64
    torch.testing.assert_close(two(x), one(x), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(two.eval()(x), two.train()(x), rtol=1e-13, atol=1e-13)


def test_a_pretrained_and_a_lora_checkpoint_are_loaded_one_after_the_other():
    torch.manual_seed(0)
    source = stirred(Net(theirs))
    pretrained = {key: value for key, value in source.state_dict().items() if "lora_" not in key}
    nets = [Net(theirs), Net(ours)]
    for net in nets:
        net.load_state_dict(pretrained, strict=False)
        net.load_state_dict(theirs.lora_state_dict(source), strict=False)
        net.eval()
    close(nets[1](some_input("Embedding")), nets[0](some_input("Embedding")))


def test_the_names_are_loaded_when_they_are_used():
    assert {"Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "MergedLinear"} <= set(ours.__all__)
    for name in ours.__all__:
        assert getattr(ours, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Liner'"):
        _ = ours.Liner
