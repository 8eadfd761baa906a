"""Put LoRA layers in the place of a model's chosen layers, and say what was covered.

Knows nothing of how layers are chosen, of files or of training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from phinetune.base.errors import SettingsError
from phinetune.base.seeds import derive
from phinetune.lora.dora import DoraLinear
from phinetune.lora.frozen import TiledLinear
from phinetune.lora.initial import layer_maker
from phinetune.lora.layers import LoraLinear
from phinetune.lora.settings import LoraSettings
from phinetune.lora.targets import DEFAULT_TARGETS, choose, default_targets, linear_layers
from phinetune.lora.weights import AdapterWeights, TaskType, Update
from phinetune.lora.whole import Kind, Part, make_part, whole_names

__all__ = [
    "DEFAULT_TARGETS",
    "Adapter",
    "Coverage",
    "LoraSettings",
    "attach",
    "default_targets",
    "linear_layers",
    "require_bare",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """One row of the coverage table: a target name, how many layers it matched, what it trains.

    Of weights trained whole: `num_layers` modules, or tokens where `kind` is rows.
    """

    target: str
    num_layers: int
    in_features: int
    out_features: int
    num_parameters: int
    kind: Kind | Literal["update"] = "update"


class Adapter:
    """The LoRA layers attached to one model, by the module path they took the place of."""

    task_type: TaskType = "CAUSAL_LM"

    def __init__(
        self, layers: dict[str, LoraLinear], settings: LoraSettings, parts: Sequence[Part] = ()
    ) -> None:
        self.layers = layers
        self.settings = settings
        # What is trained whole beside the layers.
        self.parts = tuple(parts)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """`<module>.lora_A`, `<module>.lora_B` and so on of every layer, in the order of the model."""
        for name, layer in self.layers.items():
            for part, weight in layer.trained():
                yield f"{name}.{part}", weight
        for whole in self.parts:
            yield whole.place.name, whole.weight

    def parameters(self) -> list[nn.Parameter]:
        """The trained weights, in the order of the model."""
        return [parameter for _, parameter in self.named_parameters()]

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The last parts of the adapted modules' names, sorted."""
        return tuple(sorted({name.rsplit(".", 1)[-1] for name in self.layers}))

    @property
    def coverage(self) -> list[Coverage]:
        rows = []
        for target in dict.fromkeys(name.rsplit(".", 1)[-1] for name in self.layers):
            layers = [layer for name, layer in self.layers.items() if name.rsplit(".", 1)[-1] == target]
            rows.append(
                Coverage(
                    target=target,
                    num_layers=len(layers),
                    in_features=layers[0].in_features,
                    out_features=layers[0].out_features,
                    num_parameters=sum(w.numel() for layer in layers for _, w in layer.trained()),
                )
            )
        return [*rows, *self._whole_coverage()]

    def _whole_coverage(self) -> Iterator[Coverage]:
        kinds: dict[tuple[str, Kind], list[Part]] = {}
        for part in self.parts:
            place = part.place
            target = "bias" if place.kind == "bias" else place.module.rsplit(".", 1)[-1]
            kinds.setdefault((target, place.kind), []).append(part)
        for (target, kind), parts in kinds.items():
            shape = parts[0].weight.shape
            yield Coverage(
                target=target,
                num_layers=shape[0] if kind == "rows" else len({part.place.module for part in parts}),
                in_features=shape[1] if len(shape) > 1 else 1,
                out_features=shape[0],
                num_parameters=sum(part.weight.numel() for part in parts),
                kind=kind,
            )

    def reset(self, seed: int) -> None:
        """Fresh weights: a pure function of the seed and each layer's name."""
        for name, layer in self.layers.items():
            layer.reset(torch.Generator().manual_seed(derive(seed, "lora", name)))
        for part in self.parts:
            part.reset()

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the model answers as the base alone."""
        switched: list[LoraLinear | Part] = [*self.layers.values(), *self.parts]
        before = [layer.is_enabled for layer in switched]
        for layer in switched:
            layer.is_enabled = False
        try:
            yield
        finally:
            for layer, was_enabled in zip(switched, before, strict=True):
                layer.is_enabled = was_enabled

    @property
    def has_other_form(self) -> bool:
        """Whether files hold the weights in another form, from which they cannot be told exactly."""
        return self.settings.starts_in_base

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The trained weights, and what else says what the adapter computes."""
        yield from self.named_parameters()
        for name, layer in self.layers.items():
            for part, tensor in layer.fixed():
                yield f"{name}.{part}", tensor

    @property
    def num_stored(self) -> int:
        """The numbers of a snapshot."""
        return sum(tensor.numel() for _, tensor in self.named_tensors())

    def copied_bytes(self, dtype: torch.dtype) -> int:
        """What a forward pass of any length keeps of the layers' weights in another form or type."""
        return dtype.itemsize * sum(layer.num_copied(dtype) for layer in self.layers.values())

    def snapshot(self) -> dict[str, torch.Tensor]:
        """A copy of the weights on the CPU, by the names of `named_tensors`."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.named_tensors()}

    def restore(self, weights: dict[str, torch.Tensor]) -> None:
        """Set the weights to those of a `snapshot`."""
        with torch.no_grad():
            for name, tensor in self.named_tensors():
                tensor.copy_(weights[name])

    def updates(self) -> dict[str, Update]:
        """A copy of the weights, as files hold them."""
        return {name: layer.update() for name, layer in self.layers.items()}

    def whole(self) -> dict[str, torch.Tensor]:
        """A copy of what is trained whole, as files hold it."""
        return {part.place.name: part.weight.detach().to("cpu", copy=True) for part in self.parts}

    def take(self, weights: AdapterWeights) -> None:
        """Set the weights to those of a file."""
        for name, layer in self.layers.items():
            layer.take(weights.updates[name])
        with torch.no_grad():
            for part in self.parts:
                part.weight.copy_(weights.whole[part.place.name])

    def detach(self, model: nn.Module) -> None:
        """Put the frozen layers back in their places."""
        for part in reversed(self.parts):
            part.detach(model)
        for name, layer in self.layers.items():
            _set_module(model, name, layer.base)


def attach(model: nn.Module, settings: LoraSettings, *, seed: int) -> Adapter:
    """Freeze `model` and put a `LoraLinear` in the place of every targeted linear layer.

    Targets are last parts of module names (`qkv_proj`), module paths, or either with `*`.
    Raises `SettingsError` when a target, pattern or layer number matches no linear layer, or the model
    has an adapter already.
    """
    require_bare(model)
    linears = linear_layers(model)
    chosen = choose(model, linears, settings)
    make = _layer_maker(settings, is_quantized=any(isinstance(x, TiledLinear) for x in chosen.values()))
    places = whole_names(model, settings, chosen) if settings.has_whole else []
    model.requires_grad_(False)
    layers: dict[str, LoraLinear] = {}
    for name in linears:  # the order of the model, whatever the order of the targets
        if name in chosen:
            layers[name] = make(
                chosen[name],
                rank=settings.rank_of(name),
                scaling=settings.scaling_of(name),
                dropout=settings.dropout,
            )
            layers[name].train(chosen[name].training)  # a base that answers gets no dropout
            _set_module(model, name, layers[name])
    if settings.modules_to_save:
        modules = dict.fromkeys(place.module for place in places if place.kind == "module")
        settings = replace(settings, modules_to_save=tuple(modules))
    adapter = Adapter(layers, settings, [make_part(model, place, settings) for place in places])
    adapter.reset(seed)
    return adapter


def _layer_maker(settings: LoraSettings, *, is_quantized: bool) -> Callable[..., LoraLinear]:
    if not settings.use_dora:
        return layer_maker(settings)
    if is_quantized:
        raise SettingsError(
            "DoRA cannot be used on a quantised base",
            where="use_dora",
            why="it needs the whole weight of a layer twice in every pass, which quantising is to avoid",
            do="write quantize: none, or use_dora: false",
        )
    if settings.init_lora_weights != "paper":
        raise SettingsError(
            f"DoRA cannot begin with {settings.init_lora_weights}",
            where="init_lora_weights",
            do="write init_lora_weights: paper, or use_dora: false",
        )
    return DoraLinear


def require_bare(model: nn.Module) -> None:
    """Raise `SettingsError` when the model has an adapter already: two would be one on top of the other."""
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise SettingsError(
            "the model already has an adapter",
            why="a second one would be attached to the layers of the first",
            do="detach the first adapter, or load the base again",
        )


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent_name, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent_name), child, module)
