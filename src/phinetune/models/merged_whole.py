"""Find the place of weights that were trained whole in a base's files, and put them there.

Knows nothing of updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from phinetune.base.errors import IncompatibleLowRankAdapter, nearest
from phinetune.lora.weights import AdapterWeights
from phinetune.lora.whole import ROWS
from phinetune.models.catalog import weight_files


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a base's tensors by their names in its files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in weight_files(folder):
        with safe_open(shard, framework="pt") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return shapes


def tensor_of(
    wanted: str,
    shapes: Mapping[str, object],
    name: str,
    where: str,
    *,
    do: str = "name the base it was trained on",
) -> str:
    """The base's tensor of this name. Raises `IncompatibleLowRankAdapter`, with what to `do`, without it.

    A checkpoint may have been saved from the inner model, without the first part of the path.
    """
    for key in (wanted, wanted.partition(".")[2]):
        if key in shapes:
            return key
    raise IncompatibleLowRankAdapter(
        f"the adapter has weights for '{name}', which the base does not have",
        where=where,
        why=f"the nearest weight of the base is '{nearest(wanted, shapes)}'",
        do=do,
    )


def whole_places(weights: AdapterWeights, folder: Path, where: str) -> dict[str, str]:
    """The tensor of the base that each weight trained whole takes the place of: tensor name to its name.

    Raises `IncompatibleLowRankAdapter` when the base has none of this name, shape or token.
    """
    shapes = shapes_of(folder) if weights.whole else {}
    places = {}
    for name, tensor in weights.whole.items():
        module, _, attribute = name.rpartition(".")
        is_rows = attribute == ROWS
        key = tensor_of(f"{module}.weight" if is_rows else name, shapes, name, where)
        indices = weights.settings.trainable_token_indices
        expected = (len(indices), *shapes[key][1:]) if is_rows else shapes[key]
        if tuple(tensor.shape) != expected:
            raise IncompatibleLowRankAdapter(
                f"'{name}' has the wrong shape",
                where=where,
                why=f"it is {tuple(tensor.shape)}, for this base it must be {expected}",
                do="name the base it was trained on",
            )
        if is_rows and not all(0 <= index < shapes[key][0] for index in indices):
            raise IncompatibleLowRankAdapter(
                f"'{name}' is of tokens that the base does not have",
                where=where,
                why=f"its embedding has {shapes[key][0]} rows",
                do="name the base it was trained on",
            )
        places[key] = name
    return places


def replaced(weight: Tensor, weights: AdapterWeights, name: str) -> Tensor:
    """The base's tensor with what was trained whole in it, in its own type."""
    trained = weights.whole[name].to(weight.dtype)
    if not name.endswith(f".{ROWS}"):
        return trained.contiguous()
    indices = torch.tensor(weights.settings.trainable_token_indices)
    return weight.index_copy(0, indices, trained)
