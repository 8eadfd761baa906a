"""Load a model with its linear layers quantised, one tensor at a time from memory-mapped files.

The model is built without weights; each linear layer's weight is read, quantised and dropped before the
next is touched, so that neither the file nor the full-precision model is ever in memory as a whole.
Output head and embeddings keep their type: the loss reads the head, and few bits there cost most.
Knows nothing of adapters or training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from phinetune.base.errors import ModelError, nearest
from phinetune.lora.attach import linear_layers
from phinetune.lora.frozen import is_transposed
from phinetune.models.attention import IMPLEMENTATION
from phinetune.models.catalog import weight_files
from phinetune.models.device import Compute
from phinetune.models.quantized import QuantizedLinear, quantized


def load_quantized(folder: Path, config: PreTrainedConfig, kind: str, compute: Compute) -> PreTrainedModel:
    """The causal language model of a folder, on its device. Raises `ModelError` when weights are missing."""
    with _weights_on_meta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=compute.dtype, attn_implementation=IMPLEMENTATION, trust_remote_code=False
        )
    model.tie_weights()
    fill(model, folder, kind, compute)
    for module in model.modules():  # rotary tables and the like, which no file holds
        for name, buffer in module.named_buffers(recurse=False):
            if not isinstance(module, QuantizedLinear):
                setattr(module, name, buffer.to(compute.device))
    return model


def fill(model: PreTrainedModel, folder: Path, kind: str, compute: Compute) -> None:
    """Give a model without weights those of the folder, its linear layers in the form of `kind`."""
    places = tensor_places(folder)
    prefix = f"{model.base_model_prefix}."
    linears = {name: layer for name, layer in linear_layers(model).items()}

    def read(name: str, shape: torch.Size) -> Tensor:
        # A checkpoint may have been saved from the inner model, without the first part of the names.
        key = name if name in places else name.removeprefix(prefix)
        if key not in places:
            raise ModelError(
                "the model's weights are not complete",
                where=str(folder),
                why=f"'{name}' is missing; the nearest tensor is '{nearest(name, places) or 'none'}'",
                do="download the model again; or write quantize: none, if its files use other names",
            )
        with safe_open(places[key], framework="pt") as file:
            value: Tensor = file.get_tensor(key)
        if value.shape != shape or not value.is_floating_point():
            raise ModelError(
                "the model's weights do not fit its config.json",
                where=f"{places[key]}, {key}",
                why=f"it is {tuple(value.shape)} of {value.dtype}, expected {tuple(shape)} of real numbers",
                do="download the model again, in its original precision",
            )
        return value

    for name, layer in linears.items():
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        parent_name, _, child = name.rpartition(".")
        made = quantized(
            read(f"{name}.weight", weight.shape).to(compute.device),
            read(f"{name}.bias", bias.shape).to(compute.device) if isinstance(bias, Tensor) else None,
            kind,
            dtype=compute.dtype,
            is_transposed=is_transposed(layer),
        )
        setattr(model.get_submodule(parent_name), child, made.train(layer.training))
    for name, parameter in list(model.named_parameters()):  # each tied weight once
        value = read(name, parameter.shape)
        # A copy even where nothing changes: a view would hold the whole file.
        kept = torch.empty_like(value, device=compute.device, dtype=compute.dtype).copy_(value)
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, nn.Parameter(kept, requires_grad=False))
    model.tie_weights()


def tensor_places(folder: Path) -> Mapping[str, Path]:
    """The file of each tensor of a model folder."""
    places: dict[str, Path] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    return places


@contextlib.contextmanager
def _weights_on_meta() -> Iterator[None]:
    """Within the block a new module's weights take no memory; its buffers are computed as always."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    patched: Any = nn.Module
    patched.register_parameter = on_meta
    try:
        yield
    finally:
        patched.register_parameter = register
