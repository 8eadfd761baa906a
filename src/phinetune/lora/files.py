"""Save the adapter of a model as a PEFT directory, and attach the adapter of one.

The safetensors metadata says which base the weights belong to. Knows nothing of runs or training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch import nn

from phinetune.base.errors import IncompatibleLowRankAdapter, SettingsError, nearest
from phinetune.lora.attach import Adapter, attach, linear_layers, require_bare
from phinetune.lora.frozen import features
from phinetune.lora.peft_format import CONFIG_FILE, WEIGHTS_FILE, read_peft, write_peft
from phinetune.lora.settings import LoraSettings, fits
from phinetune.lora.tensor_file import read_header
from phinetune.lora.weights import AdapterWeights, Update, described, require_no_head
from phinetune.lora.whole import whole_names, whole_shape

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "base_difference",
    "check_base",
    "check_layers",
    "load_adapter",
    "load_weights",
    "read_metadata",
    "save_adapter",
]

T = TypeVar("T")


def save_adapter(adapter: Adapter, folder: Path, *, base_name: str, metadata: Mapping[str, str]) -> None:
    """Write the two files of a PEFT directory into an existing folder.

    `metadata` goes into the safetensors header, for example `base_sha256`.
    """
    updates = adapter.updates()
    weights = AdapterWeights(
        updates=updates,
        settings=_plain_settings(adapter.settings, updates) if adapter.has_other_form else adapter.settings,
        base_name=base_name,
        whole=adapter.whole(),
        task_type=adapter.task_type,
        is_transposed=any(layer.is_transposed for layer in adapter.layers.values()),
    )
    write_peft(weights, folder, metadata=metadata)


def read_metadata(folder: Path) -> dict[str, str]:
    """The metadata of an adapter's weights file; empty for a file made elsewhere."""
    return read_header(folder / WEIGHTS_FILE)


def load_adapter(model: nn.Module, folder: Path, *, base_sha256: str = "") -> Adapter:
    """Attach the adapter of a PEFT directory to `model`; see `load_weights`."""
    require_bare(model)
    return load_weights(model, read_peft(folder), where=str(folder), base_sha256=base_sha256)


def load_weights(model: nn.Module, weights: AdapterWeights, *, where: str, base_sha256: str = "") -> Adapter:
    """Attach an adapter read from a file of any form to `model`.

    Nothing is attached unless every update has its layer and all shapes fit. Raises
    `IncompatibleLowRankAdapter` where the base (by `base_sha256`, names or shapes) is another model.
    """
    require_bare(model)
    check_base(weights, where=where, base_sha256=base_sha256)
    require_no_head(weights, where)
    check_layers(linear_layers(model), weights, where)
    exact = _exact(weights)
    _check_whole(model, weights, exact, where)
    adapter = attach(model, exact, seed=0)
    adapter.settings = weights.settings
    adapter.take(weights)
    return adapter


def _plain_settings(settings: LoraSettings, updates: Mapping[str, Update]) -> LoraSettings:
    """The settings of the plain updates that weights in another form were written as."""
    return replace(
        described(updates, dropout=settings.dropout),
        target_modules=settings.target_modules,
        layers_to_transform=settings.layers_to_transform,
        layers_pattern=settings.layers_pattern,
        bias=settings.bias,
        modules_to_save=settings.modules_to_save,
        trainable_token_indices=settings.trainable_token_indices,
    )


def _check_whole(model: nn.Module, weights: AdapterWeights, exact: LoraSettings, where: str) -> None:
    """Raise `IncompatibleLowRankAdapter` unless what was trained whole is all there and of its shape."""
    linears = linear_layers(model)
    try:
        places = whole_names(model, exact, {name: linears[name] for name in weights.updates})
    except SettingsError as error:
        raise IncompatibleLowRankAdapter(
            f"the adapter does not fit the base: {error.what}",
            where=where,
            why=error.why,
            do="load the adapter on the base it was trained on",
        ) from None
    expected = {place.name: whole_shape(model, place, exact) for place in places}
    found = {name: tuple(tensor.shape) for name, tensor in weights.whole.items()}
    for name in expected.keys() | found.keys():
        if expected.get(name) != found.get(name):
            raise IncompatibleLowRankAdapter(
                f"'{name}' is not as the base has it",
                where=where,
                why=f"the adapter has it as {found.get(name, 'nothing')}, the base as "
                f"{expected.get(name, 'nothing')}",
                do="load the adapter on the base it was trained on",
            )


def _exact(weights: AdapterWeights) -> LoraSettings:
    """The settings with the layers of the file for targets; what means no layer of it is left out."""
    settings, names = weights.settings, tuple(weights.updates)

    def used(pattern: Mapping[str, T]) -> dict[str, T]:
        return {key: value for key, value in pattern.items() if any(fits(name, key) for name in names)}

    return replace(
        settings,
        target_modules=names,
        layers_to_transform=None,
        use_dora=weights.uses_dora,
        rank_pattern=used(settings.rank_pattern),
        alpha_pattern=used(settings.alpha_pattern),
    )


def check_base(weights: AdapterWeights, *, where: str, base_sha256: str, do: str = "") -> None:
    """Raise `IncompatibleLowRankAdapter` when the adapter says that it belongs to other weights."""
    difference = base_difference(weights, base_sha256)
    if difference:
        name = weights.metadata.get("base_name") or weights.base_name or "the base it was trained on"
        raise IncompatibleLowRankAdapter(
            "the adapter belongs to another base model",
            where=where,
            why=difference,
            do=do
            or f"use it with {name}, or force it on this base where names and shapes fit: --force-base, "
            "in Python force_base=True",
        )


def base_difference(weights: AdapterWeights, base_sha256: str) -> str:
    """In words how the base differs from the one the adapter was trained on; "" where nothing says so."""
    recorded = weights.base_sha256
    if not recorded or not base_sha256 or recorded == base_sha256:
        return ""
    return f"it was trained on weights {recorded[:12]}…, this base has {base_sha256[:12]}…"


def check_layers(linears: Mapping[str, nn.Module], weights: AdapterWeights, where: str) -> None:
    """Raise `IncompatibleLowRankAdapter` unless every update has its layer, of its shape, in the base."""
    for name, update in weights.updates.items():
        if name not in linears:
            raise IncompatibleLowRankAdapter(
                f"the adapter has weights for '{name}', which the base does not have",
                where=where,
                why=f"the nearest layer of the base is '{nearest(name, linears)}'",
                do="load the adapter on the base it was trained on",
            )
        expected = features(linears[name])
        if (update.out_features, update.in_features) != expected:
            raise IncompatibleLowRankAdapter(
                f"the update of '{name}' has the wrong shape",
                where=where,
                why=f"it is for a layer {update.in_features} -> {update.out_features}; "
                f"this base has {expected[1]} -> {expected[0]}",
                do="load the adapter on the base it was trained on",
            )
